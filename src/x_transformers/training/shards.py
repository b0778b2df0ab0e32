"""Token shards: a corpus is tokenized once, into files that are memory-mapped and reused.

A prepared folder is named by what it was made of: the contents of the sources, the tokenizer, the settings. It holds parts,
each from about 64 MiB of text, and a line in ``parts.jsonl`` for each part that is complete: an interrupted preparation goes on
behind the last of them. ``index.json`` is written when all are. A part has, for training and for the held-out documents, the
token ids (``.tokens``), where each document ends (``.ends``), and how many tokens of each are its prompt (``.prompts``).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.tensor_types import Int
from x_transformers.training.data import HOLD_OUT_ONE_IN, Source
from x_transformers.training.documents import Document, has_records, read_documents
from x_transformers.training.errors import DataError
from x_transformers.training.files import read_json, write_atomically, write_json
from x_transformers.training.lock import locked
from x_transformers.training.tokens import Tokenizer

VERSION = 1
PART_BYTES = 1 << 26
ENCODE_BYTES = 1 << 22  # texts are handed to the tokenizer in groups of so many bytes
SIDES = ('train', 'held_out')
INDEX, JOURNAL = 'index.json', 'parts.jsonl'
TYPES = {'u1': (torch.uint8, 'B', 1), 'u2': (torch.uint16, 'H', 2), 'i4': (torch.int32, 'i', 4)}


def cache_folder() -> Path:
    """Where prepared corpora and trained tokenizers are kept: ``$XDG_CACHE_HOME/x-transformers``."""
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'x-transformers'


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class TextPart:
    """Token ids and documents that lie together in three files."""

    tokens: Int[Tensor, ' n']
    ends: Int[Tensor, ' d']
    prompts: Int[Tensor, ' d']


class TokenText:
    """The documents of one side of a corpus as one sequence of token ids."""

    def __init__(self, parts: Sequence[TextPart], text_bytes: int) -> None:
        self.parts = [part for part in parts if len(part.tokens)]
        self.ends = list(accumulate(len(part.tokens) for part in self.parts))
        self.documents = sum(len(part.ends) for part in self.parts)
        self.text_bytes = text_bytes

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(len(self), 1)

    @property
    def has_prompts(self) -> bool:
        return any(bool(part.prompts.any()) for part in self.parts)

    def window(self, start: int, length: int) -> Int[Tensor, ' n']:
        """``length`` ids from ``start`` on, fewer where the text ends."""
        found, index = [], bisect_right(self.ends, start)
        while length > 0 and index < len(self.parts):
            tokens = self.parts[index].tokens
            offset = start - (self.ends[index] - len(tokens))
            # the smallest type of torch that holds them all and can be computed with is taken only now
            piece = tokens[offset : offset + length].to(torch.long)
            found.append(piece)
            start, length, index = start + len(piece), length - len(piece), index + 1
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)

    def spans(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, end of its prompt) of the documents that reach into a window, all from the window's start."""
        stop, index = start + length, bisect_right(self.ends, start)
        while index < len(self.parts) and self.ends[index] - len(self.parts[index].tokens) < stop:
            part = self.parts[index]
            base = self.ends[index] - len(part.tokens)
            number = int(torch.searchsorted(part.ends, max(start - base, 0), right=True))
            while number < len(part.ends):
                first = base + (int(part.ends[number - 1]) if number else 0)
                if first >= stop:
                    return
                yield first - start, base + int(part.ends[number]) - start, first + int(part.prompts[number]) - start
                number += 1
            index += 1

    def document_spans(self) -> Iterator[tuple[int, int]]:
        """(start, end) of every document."""
        base = 0
        for part in self.parts:
            first = 0
            for end in part.ends.tolist():
                yield base + first, base + end
                first = end
            base += len(part.tokens)

    def split(self, at: int) -> tuple[TokenText, TokenText]:
        """The ids before ``at``, and the rest; a document that is cut is two."""
        left: list[TextPart] = []
        right: list[TextPart] = []
        for part, end in zip(self.parts, self.ends, strict=True):
            cut = max(0, min(len(part.tokens), at - (end - len(part.tokens))))
            for side, low, high in ((left, 0, cut), (right, cut, len(part.tokens))):
                inside = (part.ends > low) & (torch.cat((part.ends.new_zeros(1), part.ends[:-1])) < high)
                side.append(TextPart(part.tokens[low:high], part.ends[inside].clamp(max=high) - low, part.prompts[inside]))
        share = round(at / max(len(self), 1) * self.text_bytes)
        return TokenText(left, share), TokenText(right, self.text_bytes - share)


@dataclass(frozen=True)
class Prepared:
    """A corpus as token ids."""

    train: TokenText
    held_out: TokenText
    digest: str
    about: str


def load_prepared(folder: Path, about: str | None = None) -> Prepared:
    """Map the files of a prepared folder.

    Errors: ``DataError`` if a file is missing, shorter than it was, or no longer what was written.
    """
    index = read_json(folder / INDEX)
    try:
        kind = TYPES[index['type']]
        sides = {}
        for side in SIDES:
            parts = [_load_part(folder, number, side, entry[side], kind) for number, entry in enumerate(index['parts'])]
            sides[side] = TokenText(parts, sum(entry[side]['bytes'] for entry in index['parts']))
        digest = str(index['digest'])
    except (KeyError, TypeError) as error:
        raise DataError(f'{folder / INDEX} is not the index of a prepared corpus ({error!r}). Remove the folder.') from error
    return Prepared(sides['train'], sides['held_out'], digest, about or str(folder))


def _load_part(folder: Path, number: int, side: str, entry: dict[str, Any], kind: tuple[torch.dtype, str, int]) -> TextPart:
    dtype, _, width = kind
    counts = {'tokens': (entry['tokens'], dtype, width), 'ends': (entry['documents'], torch.int64, 8),
              'prompts': (entry['documents'], torch.int32, 4)}  # fmt: skip
    found = {}
    for name, (count, of, wide) in counts.items():
        path = _path(folder, number, side, name)
        _check_file(path, count * wide, entry['files'][name])
        found[name] = torch.from_file(str(path), shared=False, size=count, dtype=of) if count else torch.empty(0, dtype=of)
    return TextPart(found['tokens'], found['ends'], found['prompts'])


def _check_file(path: Path, size: int, written: dict[str, Any]) -> None:
    """The checksum is computed where the file has been touched since it was written."""
    way_out = 'Remove its folder, so that the corpus is prepared again.'
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(
            f'{path} must be a shard of {size:,} bytes, but cannot be read ({error.strerror}). {way_out}'
        ) from error
    if found.st_size != size:
        raise DataError(f'{path} must be a shard of {size:,} bytes, got {found.st_size:,}. {way_out}')
    if found.st_mtime_ns != written['time'] and digest_of(path) != written['blake2b']:
        raise DataError(f'{path} must be the shard that was written, got another checksum. {way_out}')


def _path(folder: Path, number: int, side: str, name: str) -> Path:
    return folder / f'part-{number:05d}.{side}.{name}'


# ---------------------------------------------------------------- writing


@dataclass
class _Side:
    """What is being collected for one side of one part."""

    code: str
    tokens: array[int] = field(init=False)
    ends: array[int] = field(default_factory=lambda: array('q'))
    prompts: array[int] = field(default_factory=lambda: array('i'))
    text_bytes: int = 0

    def __post_init__(self) -> None:
        self.tokens = array(self.code)


def prepare_shards(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    separator: bytes | None = None,
    say: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
    about: str | None = None,
) -> Prepared:
    """The sources as token ids: from the cache, or tokenized now.

    One document in 32 is held out, by a checksum of its contents: so equal documents fall on one side.

    Errors: ``DataError`` for sources that cannot be read; ``CheckpointError`` for a cache that cannot be written.
    """
    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    contents = content_digests(sources, cache)
    settings = [VERSION, tokenizer.digest(), (separator or b'').hex(), [source.name for source in sources], contents]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    folder = cache / 'tokens' / key
    if not (folder / INDEX).exists():
        with locked(folder, create=True, wait=True):
            if not (folder / INDEX).exists():
                _write_parts(folder, sources, tokenizer, separator, key, say)
    return load_prepared(folder, about)


def _write_parts(
    folder: Path, sources: Sequence[Source], tokenizer: Tokenizer, separator: bytes | None, key: str, say: Callable[[str], None]
) -> None:
    kind = 'u1' if tokenizer.size <= 1 << 8 else 'u2' if tokenizer.size <= 1 << 16 else 'i4'
    parts = _finished_parts(folder)
    done = parts[-1]['read'] if parts else 0
    if done:
        say(f'going on with a preparation that was interrupted after {done:,} documents')
    code = TYPES[kind][1]
    sides = {side: _Side(code) for side in SIDES}
    read = collected = 0
    group: list[Document] = []
    group_bytes = 0

    def flush() -> None:
        nonlocal group, group_bytes
        _encode(group, tokenizer, sides)
        group, group_bytes = [], 0

    def close_part() -> None:
        nonlocal sides, collected
        flush()
        entry = {'read': read} | {side: _write_side(folder, len(parts), side, made) for side, made in sides.items()}
        with open(folder / JOURNAL, 'a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')
            file.flush()
            os.fsync(file.fileno())
        parts.append(entry)
        sides, collected = {side: _Side(code) for side in SIDES}, 0
        say(f'prepared {read:,} documents, {sum(p[s]["tokens"] for p in parts for s in SIDES):,} tokens')

    for source in sources:
        for document in read_documents(source, separator):
            read += 1
            if read <= done:
                continue
            group.append(document)
            group_bytes += len(document.text)
            collected += len(document.text)
            if group_bytes >= ENCODE_BYTES:
                flush()
            if collected >= PART_BYTES:
                close_part()
    if collected or not parts:
        close_part()
    write_json(
        folder / INDEX, {'version': VERSION, 'type': kind, 'digest': key, 'tokenizer': tokenizer.digest(), 'parts': parts}
    )


def _finished_parts(folder: Path) -> list[dict[str, Any]]:
    """What the journal says; a line that was being written when the process died is cut off."""
    path = folder / JOURNAL
    if not path.exists():
        return []
    parts = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            parts.append(json.loads(line))
        except ValueError:
            break
    write_atomically(path, ''.join(json.dumps(part) + '\n' for part in parts).encode())
    return parts


def _encode(group: Sequence[Document], tokenizer: Tokenizer, sides: dict[str, _Side]) -> None:
    texts: list[bytes] = []
    for document in group:
        texts += [document.text[: document.prompt], document.text[document.prompt :]] if document.prompt else [document.text]
    encoded = iter(tokenizer.encode(texts))
    for document in group:
        side = sides['held_out' if is_held_out(document.text) else 'train']
        if document.prompt:
            prompt = next(encoded)
            side.tokens.extend(prompt)
        side.prompts.append(len(prompt) if document.prompt else 0)
        side.tokens.extend(next(encoded))
        if tokenizer.end is not None:
            side.tokens.append(tokenizer.end)
        side.ends.append(len(side.tokens))
        side.text_bytes += len(document.text)


def is_held_out(text: bytes) -> bool:
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), 'big') % HOLD_OUT_ONE_IN == 0


def _write_side(folder: Path, number: int, side: str, made: _Side) -> dict[str, Any]:
    files = {}
    for name, values in (('tokens', made.tokens), ('ends', made.ends), ('prompts', made.prompts)):
        path = _path(folder, number, side, name)
        if sys.byteorder != 'little':
            raise DataError('token shards must be written on a little-endian machine, got a big-endian one.')
        data = values.tobytes()
        write_atomically(path, data)
        files[name] = {'time': path.stat().st_mtime_ns, 'blake2b': hashlib.blake2b(data, digest_size=16).hexdigest()}
    return {'tokens': len(made.tokens), 'documents': len(made.ends), 'bytes': made.text_bytes, 'files': files}


# ---------------------------------------------------------------- contents


def content_digests(sources: Sequence[Source], cache: Path) -> list[str]:
    """A checksum of each file's contents; one whose size and time are those of an earlier call is not read again."""
    path = cache / 'contents.json'
    known: dict[str, list[Any]] = {}
    if path.exists():
        try:
            known = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            known = {}
    found, changed = [], False
    for source in sources:
        try:
            facts = source.path.stat()
            name = str(source.path.resolve())
            entry = known.get(name)
            if entry is None or entry[:2] != [facts.st_size, facts.st_mtime_ns]:
                entry = known[name] = [facts.st_size, facts.st_mtime_ns, digest_of(source.path)]
                changed = True
        except OSError as error:
            raise DataError(f'{source.path} cannot be read: {error.strerror or error}') from error
        found.append(str(entry[2]))
    if changed:
        write_atomically(path, json.dumps(known).encode())
    return found


def digest_of(path: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


__all__ = ['Prepared', 'TokenText', 'cache_folder', 'has_records', 'load_prepared', 'prepare_shards']
