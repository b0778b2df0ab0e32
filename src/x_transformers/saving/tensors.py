"""Safetensors files, read one tensor at a time into existing memory: no mapping, no second copy."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from x_transformers.saving.errors import FolderError
from x_transformers.tensor_types import Shaped

# the names of dtypes in the format's header
DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
    'F8_E4M3': torch.float8_e4m3fn, 'F8_E5M2': torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# no header of a real file is longer
LONGEST_HEADER = 100_000_000
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD = 5 * 2**30
# bytes that are held beside a tensor while it is read into its place
PIECE = 2**20


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorSource:
    """Where a parameter's numbers come from: their dtype, and what writes them into a tensor of the parameter's shape."""

    dtype: torch.dtype
    into: Callable[[Tensor], None]


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name; a tensor is read when it is asked for.

    Raises FolderError before any tensor is read if a file is missing, truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, TensorPlace] = {}
        self.metadata: dict[str, str] = {}
        for file in files_of(folder):
            places, metadata = read_header(file)
            self.places |= places
            self.metadata |= metadata

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        # a Mapping would read the tensor to see whether it is there
        return name in self.places

    def stored(self, name: str) -> TensorSource:
        """What reads one tensor into its place."""
        place = self.places[name]
        return TensorSource(place.dtype, partial(read_into, place))

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, number by number; read in pieces."""
        first, second = self.places[one], self.places[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return first.shape == second.shape and torch.equal(self[one], self[other])
        return all(torch.equal(a, b) for (_, a), (_, b) in zip(pieces(first), pieces(second), strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def dtype(self) -> torch.dtype:
        """The dtype of most numbers."""
        sizes: dict[torch.dtype, int] = {}
        for place in self.places.values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + place.end - place.begin
        floating = {dtype: size for dtype, size in sizes.items() if dtype.is_floating_point}
        return max(floating, key=lambda dtype: floating[dtype], default=torch.float32)


def files_of(folder: Path) -> list[Path]:
    """The files with weights: one, or those that an index names."""
    index = folder / INDEX
    if index.is_file():
        table = json_object(index).get('weight_map')
        if not isinstance(table, Mapping) or not table:
            raise FolderError(f'{index} must have a weight_map, a table from tensors to files; it has none.')
        files = [folder / str(name) for name in sorted(set(table.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FolderError(f'{folder} lacks {", ".join(missing)}, which {INDEX} names. Fetch the folder again.')
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not folder.is_dir():
        raise FolderError(f'{folder} is no folder.')
    old = [file.name for file in folder.iterdir() if file.suffix in ('.bin', '.pt', '.pth', '.h5', '.msgpack')]
    hint = f' It has {old[0]}: convert that to safetensors first.' if old else ''
    raise FolderError(f'{folder} holds no weights: there is neither {WEIGHTS} nor {INDEX}.{hint}')


def json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FolderError(f'{file.parent} has no {file.name}.') from None
    except (ValueError, OSError) as error:
        raise FolderError(f'{file} cannot be read as JSON: {error}.') from None
    if not isinstance(value, dict):
        raise FolderError(f'{file} must hold a JSON object, got a {type(value).__name__}.')
    return value


def read_header(file: Path) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """(where each tensor lies, the file's metadata)."""
    size = file.stat().st_size
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(8), 'little')
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise FolderError(f'{file} is truncated, or no safetensors file. Fetch it again.')
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop('__metadata__', {})
            places = {name: place_of(file, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, FolderError):
                raise
            raise FolderError(f'{file} is no safetensors file: its header cannot be read. Fetch it again.') from None
    end = max((place.end for place in places.values()), default=8 + length)
    if end > size:
        raise FolderError(f'{file} is truncated: its header promises {end} bytes, and there are {size}. Fetch it again.')
    return places, metadata


def place_of(file: Path, name: str, entry: Mapping[str, Any], start: int) -> TensorPlace:
    if entry['dtype'] not in DTYPES:
        raise FolderError(f'{file}: {name} is of dtype {entry["dtype"]}, which is not supported ({", ".join(DTYPES)} are).')
    dtype, shape = DTYPES[entry['dtype']], tuple(int(size) for size in entry['shape'])
    begin, end = (start + int(offset) for offset in entry['data_offsets'])
    count = 1
    for length in shape:
        count *= length
    if end - begin != count * dtype.itemsize:
        raise FolderError(f'{file}: {name} of shape {shape} needs {count * dtype.itemsize} bytes, got {end - begin}.')
    return TensorPlace(file, dtype, shape, begin, end)


def read_tensor(place: TensorPlace) -> Tensor:
    """One tensor, in memory of its own."""
    if place.end == place.begin:
        return torch.empty(place.shape, dtype=place.dtype)
    memory = scratch(place.end - place.begin)
    with place.file.open('rb', buffering=0) as stream:
        stream.seek(place.begin)
        take(place.file, stream, memory)
    return torch.frombuffer(memory, dtype=place.dtype).view(place.shape)


def scratch(size: int) -> bytearray | mmap.mmap:
    """Memory that goes back to the system as soon as nobody holds it: much of what is freed would stay with the process."""
    return bytearray(size) if size < PIECE // 16 else mmap.mmap(-1, size)


def take(file: Path, stream: IO[bytes], memory: bytearray | mmap.mmap) -> None:
    """Fill memory with the next bytes of a file."""
    view, filled = memoryview(memory), 0
    while filled < len(memory):
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise FolderError(f'{file} is truncated. Fetch it again.')
        filled += got


def pieces(place: TensorPlace, row: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(where it begins, some of the numbers), one after the other; each lies in the memory of the one before.

    ``row``: numbers that stay together.
    """
    whole, unit = place.end - place.begin, max(row, 1) * place.dtype.itemsize
    size = max(PIECE // unit, 1) * unit
    memory = scratch(min(whole, size))
    with place.file.open('rb', buffering=0) as stream:
        stream.seek(place.begin)
        for begin in range(0, whole, size):
            if whole - begin < len(memory):
                memory = scratch(whole - begin)
            take(place.file, stream, memory)
            yield begin // place.dtype.itemsize, torch.frombuffer(memory, dtype=place.dtype)


def rows_of_place(place: TensorPlace) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, some of the rows), one after the other; each lies in the memory of those before."""
    row = math.prod(place.shape[1:])
    for begin, piece in pieces(place, row):
        yield begin // max(row, 1), piece.view(-1, *place.shape[1:])


def read_into(place: TensorPlace, out: Shaped[Tensor, '...']) -> None:
    """One tensor into memory that is there, of any dtype and on any device. Raises FolderError for another shape."""
    if tuple(out.shape) != place.shape:
        raise FolderError(
            f"a tensor in {place.file} must have the shape of the model's, {tuple(out.shape)}, got {place.shape}. Load it "
            'into the model that it was saved from.'
        )
    if not out.is_contiguous():
        out.copy_(read_tensor(place))
        return
    flat = out.view(-1)
    for begin, piece in pieces(place):
        flat[begin : begin + piece.numel()].copy_(piece)


# ---------------------------------------------------------------- writing


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Shaped[Tensor, '...']]],
    *,
    metadata: Mapping[str, str],
    shard: int | None = SHARD,
) -> None:
    """One file of weights, or several with an index if they are larger than ``shard`` bytes (None: one, however large).

    ``tensors`` are taken one after the other, so that what is made for a file can be let go of after it.
    """
    from safetensors.torch import save_file

    files: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, folder / f'part-{len(files)}', metadata=dict(metadata))
        files.append({name: t.numel() * t.element_size() for name, t in held.items()})
        held, size = {}, 0

    for name, tensor in tensors:
        t = tensor.detach().to('cpu').contiguous()
        if held and shard is not None and size + t.numel() * t.element_size() > shard:
            flush()
        held[name] = t
        size += t.numel() * t.element_size()
    flush()
    if len(files) == 1:
        os.replace(folder / 'part-0', folder / WEIGHTS)
        return
    names = [f'model-{number + 1:05}-of-{len(files):05}.safetensors' for number in range(len(files))]
    for number, name in enumerate(names):
        os.replace(folder / f'part-{number}', folder / name)
    table = {tensor: names[number] for number, held_there in enumerate(files) for tensor in held_there}
    total = sum(sum(held_there.values()) for held_there in files)
    index = {'metadata': {'total_size': total}, 'weight_map': table}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
