"""An iterator over the documents of files of many kinds; it never holds a whole file.

Text is split at a separator, else at every 1 MiB; each line of a ``.jsonl`` and each row of a ``.parquet`` or ``.arrow`` file
is a document, or a prompt and its completion. ``.gz`` and ``.zst`` are unpacked on the way.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from x_transformers.training.data import Source
from x_transformers.training.errors import DataError

PIECE = 1 << 20  # text without a separator is cut at every so many bytes
LARGEST_RECORD = 1 << 30
TEXT_COLUMNS = ('text', 'content')
EXTRA = "it needs its extra: pip install '.[data]' in a clone"


@dataclass(frozen=True)
class Document:
    """Bytes to learn from; the first ``prompt`` of them are only read, not predicted."""

    text: bytes
    prompt: int = 0


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in ('.gz', '.zst'):
        suffixes.pop()
    return suffixes[-1] if suffixes else ''


def has_records(path: Path) -> bool:
    """Whether a file holds documents, and not just text."""
    return kind_of(path) in ('.jsonl', '.ndjson', '.parquet', '.arrow')


def read_documents(source: Source, separator: bytes | None = None) -> Iterator[Document]:
    """The documents of one file, in its order.

    Errors: ``DataError`` for a file that cannot be read, and for records that are too large or hold no text.
    """
    kind = kind_of(source.path)
    try:
        if kind in ('.jsonl', '.ndjson'):
            yield from _lines(source.path)
        elif kind == '.parquet':
            yield from _parquet(source.path)
        elif kind == '.arrow':
            yield from _arrow(source.path)
        else:
            yield from _text(source.path, separator)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{source.path} cannot be read: {getattr(error, "strerror", None) or error}') from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file as its uncompressed bytes."""
    if path.suffix.lower() == '.gz':
        with gzip.open(path, 'rb') as file:
            yield file  # type: ignore[misc]
    elif path.suffix.lower() == '.zst':
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f'{path} is compressed with zstd: {EXTRA}') from error
        try:
            with open(path, 'rb') as packed, zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as raw:
                yield io.BufferedReader(raw)
        except zstandard.ZstdError as error:
            raise DataError(f'{path} cannot be read: {error}') from error
    else:
        with open(path, 'rb') as file:
            yield file


def _text(path: Path, separator: bytes | None) -> Iterator[Document]:
    held = bytearray()
    with opened(path) as file:
        while block := file.read(PIECE):
            searched = max(0, len(held) - len(separator or b'') + 1)
            held += block
            if separator is None:
                cut = _good_cut(held)
                yield Document(bytes(held[:cut]))
                del held[:cut]
                continue
            while (at := held.find(separator, searched)) >= 0:
                if at:
                    yield Document(bytes(held[:at]))
                del held[: at + len(separator)]
                searched = 0
            if len(held) > LARGEST_RECORD:
                raise DataError(f'{path} must hold the --document-separator within 1 GiB, got none. Give another one, or none.')
    if held:
        yield Document(bytes(held))


def _good_cut(text: bytearray) -> int:
    """Where to cut: behind the last line if it ends near, else between two characters of UTF-8."""
    line = text.rfind(b'\n', max(0, len(text) - 4096)) + 1
    if line:
        return line
    cut = len(text)
    while cut > max(1, len(text) - 4) and text[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    # what is left of the cut may be the first byte of a longer character
    return cut - 1 if cut > 1 and text[cut - 1] >= 0xC0 else len(text)


def _lines(path: Path) -> Iterator[Document]:
    with opened(path) as file:
        number = 0
        while line := file.readline(LARGEST_RECORD + 1):
            number += 1
            if len(line) > LARGEST_RECORD:
                raise too_large(f'{path}, line {number}')
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f'{path}, line {number} must be a JSON object, got something else ({error}).') from error
            yield from _record(record, f'{path}, line {number}')


def too_large(where: str) -> DataError:
    return DataError(f'{where} must be a record of at most 1 GiB, got a larger one. Split it.')


def _record(record: Any, where: str) -> Iterator[Document]:
    if not isinstance(record, Mapping):
        raise DataError(f'{where} must be a JSON object, got {type(record).__name__}.')
    if 'prompt' in record and 'completion' in record:
        names: Sequence[str] = ('prompt', 'completion')
    else:
        names = [name for name in TEXT_COLUMNS if name in record][:1]
    if not names:
        found = ', '.join(map(str, record))
        raise DataError(f'{where} must have `text`, `content`, or `prompt` and `completion`, got {found}.')
    parts = []
    for name in names:
        value = record[name]
        if not isinstance(value, (str, bytes)):
            raise DataError(f'{where}: `{name}` must be text, got {type(value).__name__}.')
        parts.append(value if isinstance(value, bytes) else value.encode('utf-8', 'surrogatepass'))
    prompt = len(parts[0]) if len(parts) == 2 else 0
    if sum(map(len, parts)) > LARGEST_RECORD:
        raise too_large(where)
    text = b''.join(parts)
    if len(text) > prompt:
        yield Document(text, prompt)


def _parquet(path: Path) -> Iterator[Document]:
    arrow, parquet = _pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            meta = file.metadata
            names = _columns(file.schema_arrow.names, path)
            row = 0
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group)
                if rows.num_rows == 1 and rows.total_byte_size > LARGEST_RECORD:
                    raise too_large(f'{path}, row {row}')
                # so many as take some 64 MiB together
                few = max(1, min(256, (rows.num_rows << 26) // max(rows.total_byte_size, 1)))
                for batch in file.iter_batches(batch_size=few, row_groups=[group], columns=names):
                    _check_sizes(batch, path, row)
                    for record in batch.to_pylist():
                        yield from _record(record, f'{path}, row {row}')
                        row += 1
    except arrow.ArrowException as error:
        raise DataError(f'{path} cannot be read as parquet: {str(error).splitlines()[0]}') from error


def _arrow(path: Path) -> Iterator[Document]:
    """The files of a folder that ``datasets`` has saved."""
    arrow, _ = _pyarrow(path)
    try:
        with arrow.memory_map(str(path)) as mapped, arrow.ipc.open_stream(mapped) as stream:
            names = _columns(stream.schema.names, path)
            row = 0
            for batch in stream:
                for start in range(0, batch.num_rows, 256):
                    few = batch.slice(start, 256).select(names)
                    _check_sizes(few, path, row)
                    for record in few.to_pylist():
                        yield from _record(record, f'{path}, row {row}')
                        row += 1
    except arrow.ArrowException as error:
        raise DataError(f'{path} cannot be read as arrow: {str(error).splitlines()[0]}') from error


def _check_sizes(batch: Any, path: Path, first: int) -> None:
    """Before the rows are copied, several times, to become Python's."""
    if batch.nbytes <= LARGEST_RECORD:
        return
    for row in range(batch.num_rows):
        values = [column[row] for column in batch.columns]
        # what is no text has no buffer, and another sentence
        if sum(value.as_buffer().size for value in values if value.is_valid and hasattr(value, 'as_buffer')) > LARGEST_RECORD:
            raise too_large(f'{path}, row {first + row}')


def _columns(names: Sequence[str], path: Path) -> list[str]:
    if 'prompt' in names and 'completion' in names:
        return ['prompt', 'completion']
    found = [name for name in TEXT_COLUMNS if name in names][:1]
    if not found:
        raise DataError(f'{path} must have a column `text`, `content`, or `prompt` and `completion`, got {", ".join(names)}.')
    return found


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'{path} is a file of Arrow: {EXTRA}') from error
    return pyarrow, pyarrow.parquet
