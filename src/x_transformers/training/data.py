"""Text as bytes: the sources, the held-out files, the windows of each step."""

from __future__ import annotations

import glob
import gzip
import hashlib
import math
import os
import sysconfig
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from x_transformers.tensor_types import Float, Int
from x_transformers.training.errors import DataError

TEST_FOLDERS = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
MAP_FROM = 1 << 24  # files of this many bytes and more are mapped into memory, smaller ones are read and joined
HOLD_OUT_ONE_IN = 32


@dataclass(frozen=True)
class Source:
    """A file and the name that decides on which side of the split it falls."""

    path: Path
    name: str

    @property
    def held_out(self) -> bool:
        """By a hash of the name, so that files which come or go do not move the others."""
        return (
            int.from_bytes(hashlib.sha256(self.name.encode('utf-8', 'surrogateescape')).digest(), 'big') % HOLD_OUT_ONE_IN == 0
        )


class Text:
    """Bytes in pieces that are read as one; pieces may be mapped files."""

    def __init__(self, pieces: Sequence[Int[Tensor, ' n']]) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]
        self.ends = list(accumulate(len(piece) for piece in self.pieces))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def window(self, start: int, length: int) -> Int[Tensor, ' n']:
        """``length`` bytes from ``start`` on, fewer where the text ends."""
        parts, index = [], bisect_right(self.ends, start)
        while length > 0 and index < len(self.pieces):
            offset = start - (self.ends[index] - len(self.pieces[index]))
            part = self.pieces[index][offset : offset + length]
            parts.append(part)
            start, length, index = start + len(part), length - len(part), index + 1
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)

    def split(self, at: int) -> tuple[Text, Text]:
        """The bytes before ``at``, and the rest."""
        left: list[Tensor] = []
        right: list[Tensor] = []
        for piece, end in zip(self.pieces, self.ends, strict=True):
            cut = max(0, min(len(piece), at - (end - len(piece))))
            left.append(piece[:cut])
            right.append(piece[cut:])
        return Text(left), Text(right)

    def chunks(self, length: int = 1 << 20) -> Iterator[bytes]:
        for start in range(0, len(self), length):
            yield self.window(start, length).numpy().tobytes()

    def digest(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for chunk in self.chunks():
            total.update(chunk)
        return total.hexdigest()


@dataclass(frozen=True)
class Corpus:
    train: Text
    held_out: Text
    about: str  # one line for people

    def fingerprint(self) -> str:
        """Changes when any byte of either side does."""
        return f'{self.train.digest()}-{self.held_out.digest()}'


# where files come from


def standard_library() -> list[Source]:
    """The source of Python's own standard library on this machine, without its tests."""
    root = Path(sysconfig.get_path('stdlib'))
    found = [
        Source(path, path.relative_to(root).as_posix())
        for path in root.rglob('*.py')
        if not TEST_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    if not found:
        raise DataError(f'{root} holds no .py files: this Python comes without its library as source; give --data PATH')
    return sorted(found, key=lambda source: source.name)


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """Files, folders (everything below, hidden files left out) and globs, each file once."""
    found: dict[Path, Source] = {}
    for pattern in patterns:
        for source in _expand(pattern):
            found.setdefault(source.path.resolve(), source)
    return sorted(found.values(), key=lambda source: (source.name, str(source.path)))


def _expand(pattern: str) -> list[Source]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        below = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        files = [(file, file.relative_to(path)) for file in below if file.is_file()]
        sources = [
            Source(file, name.as_posix()) for file, name in files if not any(part.startswith('.') for part in name.parts)
        ]
        if not sources:
            raise DataError(f'--data {pattern}: the folder holds no files')
        return sources
    if path.is_file():
        return [Source(path, path.name)]
    if path.exists():
        raise DataError(f'--data {pattern} must be a file or a folder, got a pipe or a device. Write it to a file first.')
    if not glob.has_magic(pattern):
        raise DataError(f'--data {pattern}: there is no such file or folder')
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f'--data {pattern}: no file matches')
    return [source for match in matches for source in (_expand(match) if os.path.isfile(match) else [])]


# reading


def read_source(source: Source) -> Int[Tensor, ' n']:
    """A file's bytes (uncompressed if it ends in .gz); a large one is mapped, not read."""
    try:
        if source.path.suffix == '.gz':
            with gzip.open(source.path, 'rb') as file:
                return _as_tensor(file.read())
        size = source.path.stat().st_size
        if size >= MAP_FROM:
            with open(source.path, 'rb'):  # says why, where the mapping would only fail
                pass
            return torch.from_file(str(source.path), shared=False, size=size, dtype=torch.uint8)
        return _as_tensor(source.path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        raise DataError(f'{source.path} cannot be read: {reason}') from error


def _as_tensor(data: bytes) -> Int[Tensor, ' n']:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def read_text(sources: Sequence[Source]) -> Text:
    """All files as one text: neighbours that were read are joined, so that windows are cheap."""
    pieces: list[Tensor] = []
    small: list[Tensor] = []
    for source in sources:
        piece = read_source(source)
        if len(piece) < MAP_FROM:
            small.append(piece)
            continue
        if small:
            pieces.append(torch.cat(small))
            small = []
        pieces.append(piece)
    if small:
        pieces.append(torch.cat(small))
    return Text(pieces)


def load_corpus(patterns: Sequence[str] = (), *, window: int) -> Corpus:
    """Read everything and hold some out: one file in 32, or the last part where too few files would be held out.

    ``window`` is the number of bytes a training example needs; both sides must have as many.

    Errors: ``DataError`` for a path that is missing, unreadable or empty, and for too little text.
    """
    sources = find_sources(patterns) if patterns else standard_library()
    about = ', '.join(patterns) if patterns else "the source of Python's standard library"
    train = read_text([source for source in sources if not source.held_out])
    held_out = read_text([source for source in sources if source.held_out])
    total = len(train) + len(held_out)
    if total == 0:
        raise DataError(f'{about}: all {len(sources)} files are empty' if len(sources) > 1 else f'{about}: the file is empty')
    held_files = sum(source.held_out for source in sources)
    way = f'{held_files} of {len(sources)} files held out'
    if min(len(train), len(held_out)) < max(window, total // 100):
        whole = read_text(sources)
        train, held_out = whole.split(total - max(total // HOLD_OUT_ONE_IN, window))
        way = 'the end of the text held out'
    if len(train) < window:
        raise DataError(
            f'{about}: {total:,} bytes are too few; one training window and one held-out window take {window:,} bytes each: '
            'give more text or a smaller --seq-len'
        )
    return Corpus(train, held_out, f'{about}: {len(train):,} bytes to train on, {len(held_out):,} held out ({way})')


# what a step sees


def batch_seed(seed: int, index: int) -> int:
    """A seed for one micro-batch that depends on nothing else, so that a resumed run needs no state of the sampler."""
    return int.from_bytes(hashlib.blake2b(f'{seed}/{index}'.encode(), digest_size=4).digest(), 'big')


def sample_batch(text: Text, *, batch: int, window: int, seed: int, index: int) -> Int[Tensor, 'b n']:
    """``batch`` windows at random places, the same for the same ``seed`` and ``index``."""
    generator = torch.Generator().manual_seed(batch_seed(seed, index))
    starts = torch.randint(len(text) - window + 1, (batch,), generator=generator)
    return torch.stack([text.window(int(start), window) for start in starts]).long()


class ByteBatches:
    """Windows of bytes at random places, for ``Trainer``: batch number ``index`` depends on the seed alone.

    Of ``world_size`` processes, the one with number ``rank`` takes every ``world_size``-th row.
    """

    def __init__(self, text: Text, *, batch: int, window: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.text, self.rows, self.window, self.seed = text, batch, window, seed
        self.rank, self.world_size = rank, world_size

    def batch(self, index: int) -> Int[Tensor, 'b n']:
        rows = sample_batch(self.text, batch=self.rows, window=self.window, seed=self.seed, index=index)
        return rows[self.rank :: self.world_size]

    def predictions(self, batch: Int[Tensor, 'b n']) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)


def held_out_batches(text: Text, *, batch: int, window: int, limit: int | None = None) -> Iterator[Int[Tensor, 'b n']]:
    """Windows over the whole text, each sharing one byte with the next, so that every byte but the first is predicted once.

    ``limit`` asks for about so many bytes, from windows evenly spread. The last window is shorter: it comes alone.
    """
    starts = list(range(0, max(len(text) - 1, 0), window - 1))
    if limit is not None:
        count = max(1, limit // (window - 1))
        starts = starts[:: max(1, -(-len(starts) // count))]
    windows = [text.window(start, window) for start in starts]
    whole = [item for item in windows if len(item) == window]
    for index in range(0, len(whole), batch):
        yield torch.stack(whole[index : index + batch]).long()
    yield from (item.long().unsqueeze(0) for item in windows if 1 < len(item) < window)


def bits_per_byte(
    loss: Callable[[Int[Tensor, 'b n']], Float[Tensor, '']], text: Text, *, batch: int, window: int, limit: int | None = None
) -> float:
    """The mean over all predicted bytes of a text, each window on its own; ``loss`` gives the mean of a batch in nats."""
    total, count = 0.0, 0
    for ids in held_out_batches(text, batch=batch, window=window, limit=limit):
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        total += float(loss(ids)) * predicted
        count += predicted
    return total / count / math.log(2)
