"""Distributed checkpoints: each process writes its part, and any number of processes reads (torch.distributed.checkpoint).

A folder ``checkpoint-NNNNNNNN`` holds the parts, the state without its tensors (``state.pt``), the whole weights for use
(``export.safetensors``) and a manifest with checksums. The folder gets its name once all of it is on disk.
"""

from __future__ import annotations

import io
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Placement, Shard, empty
from torch.distributed.tensor.placement_types import _StridedShard

from x_transformers.distributed.mesh import World
from x_transformers.tensor_types import Shaped, StateDict
from x_transformers.training import files
from x_transformers.training.errors import CheckpointError

PARTS = '.metadata'  # a checkpoint with this file is a distributed one
ELSEWHERE = 'tensor:'  # prefix of the placeholder of a tensor in state.pt
FOR_USE = 'export.'  # prefix of the weights for use, if training continues with others
SPREAD = ('optimizers', 'averaged')  # the parts of the state whose tensors have the shapes of parameters


def is_distributed(path: Path) -> bool:
    return (path / PARTS).exists()


class DistributedCheckpoints:
    """The checkpoints of one run folder; every process calls every method.

    Training waits while each process copies its part to the CPU. A thread does the rest, and communicates in its own process
    group.
    """

    def __init__(self, run: Path, keep: int, world: World) -> None:
        self.run, self.keep, self.world, self.group = run, keep, world, world.aside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[Path] = []

    def save(self, step: int, weights: StateDict, state: Mapping[str, Any], export: StateDict) -> None:
        self.wait()
        tensors = {f'model.{name}': tensor for name, tensor in weights.items() if not tensor.is_meta}
        rest = {name: put_aside(value, name, tensors) if name in SPREAD else value for name, value in state.items()}
        if export is not weights:
            tensors |= {f'{FOR_USE}{name}': tensor for name, tensor in export.items() if not tensor.is_meta}
        copied = {name: in_order(tensor).to('cpu', copy=True) for name, tensor in tensors.items()}

        def write() -> None:
            try:
                self._finished.append(self.write(step, copied, rest, FOR_USE if export is not weights else 'model.'))
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name='checkpoint')
        self._thread.start()

    def write(self, step: int, tensors: dict[str, Any], rest: dict[str, Any], for_use: str) -> Path:
        """Write one checkpoint with all processes. ``for_use``: the prefix of the names of the weights for use."""
        target = self.run / f'{files.PREFIX}{step:08d}'
        temporary = self.run / f'{files.UNFINISHED}{target.name}'
        if self.world.degrees.pipeline > 1:
            rest |= joined(self.alike(lambda: {name: rest[name] for name in SPREAD if name in rest}, 'cannot be written'))
        self.alike(lambda: make_empty(temporary), 'cannot be written', main_only=True)
        self.alike(lambda: save(tensors, checkpoint_id=temporary, process_group=self.group), 'cannot be written')
        digests = self.alike(lambda: digests_of(temporary, self.world), 'cannot be written')

        def finish() -> None:
            buffer = io.BytesIO()
            torch.save(rest, buffer)
            exported = files.weights_as_bytes(read_named(temporary, for_use))
            more = {files.STATE: buffer.getvalue(), files.EXPORT: exported}
            manifest = {name: entry for each in digests for name, entry in each.items()}
            for name, data in more.items():
                files.write_synced(temporary / name, data)
                manifest[name] = {'bytes': len(data), 'blake2b': files.digest(data)}
            files.write_synced(temporary / files.MANIFEST, json.dumps({'step': step, 'files': manifest}, indent=2).encode())
            files.sync_folder(temporary)
            files.remove(target)
            os.rename(temporary, target)
            files.sync_folder(self.run)
            for older in files.find_checkpoints(self.run)[: -self.keep]:
                files.remove(older)
            files.write_atomically(self.run / files.WEIGHTS, exported)

        self.alike(finish, 'cannot be written', main_only=True)
        return target

    def alike(self, act: Callable[[], Any], problem: str, main_only: bool = False) -> list[Any]:
        """The results of ``act`` of all processes. If one process fails, all fail, and earlier checkpoints stay."""
        found, error = None, ''
        if self.world.is_main or not main_only:
            try:
                found = act()
            except CheckpointError as failure:
                error = str(failure)
            except Exception as failure:
                error = f'the checkpoint {problem} to {self.run}: {failure}; earlier ones are untouched'
        everywhere: list[Any] = [None] * self.world.size
        dist.all_gather_object(everywhere, (found, error), group=self.group)
        if told := [each for _, each in everywhere if each]:
            raise CheckpointError(told[0])
        return [each for each, _ in everywhere]

    def finished(self) -> list[Path]:
        """The checkpoints completed since the last call, in the same step in all processes.

        Errors: ``CheckpointError`` if the last one could not be written.
        """
        if self._thread is not None:
            busy = torch.tensor(int(self._thread.is_alive()), device=self.world.device)
            dist.all_reduce(busy, dist.ReduceOp.MAX)
            if not busy:
                self.wait()
        done, self._finished = self._finished, []
        return done

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Errors: ``CheckpointError`` if it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def save_best(self, step: int, value: float, export: StateDict) -> None:
        self.wait()
        whole = whole_on_main(export, self.world)
        about = {'step': str(step), 'value': repr(value)}
        data = files.weights_as_bytes(whole, about)
        self.alike(lambda: files.write_atomically(self.run / files.BEST, data), 'cannot be written', main_only=True)


def make_empty(folder: Path) -> None:
    files.remove(folder)
    folder.mkdir()


def put_aside(value: Any, path: str, tensors: dict[str, Shaped[Tensor, '...']]) -> Any:
    """The tree with a placeholder for each tensor. The tensor goes to ``tensors`` unless another process holds it."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            tensors[path] = value
        return ELSEWHERE + path
    if isinstance(value, Mapping):
        return {name: put_aside(each, f'{path}.{name}', tensors) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(put_aside(each, f'{path}.{index}', tensors) for index, each in enumerate(value))
    return value


def joined(trees: Sequence[Any]) -> Any:
    """Merge the trees of all stages. Each holds the state of its own parameters."""
    first = trees[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for tree in trees for name in tree)
        return {name: joined([tree[name] for tree in trees if name in tree]) for name in names}
    if isinstance(first, (list, tuple)):
        return type(first)(joined(parts) for parts in zip(*trees, strict=True))
    return first


def in_order(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
    """The tensor with one contiguous piece for each process, as files describe it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    moved: Tensor = tensor.redistribute(placements=in_one_piece(tensor))
    return moved.detach()


def in_one_piece(tensor: DTensor) -> list[Placement]:
    """Contiguous rows in place of strided ones."""
    return [Shard(place.dim) if isinstance(place, _StridedShard) else place for place in tensor.placements]


def empty_like(tensor: Shaped[Tensor, '...'], dtype: torch.dtype) -> Shaped[Tensor, '...']:
    """An empty tensor to read ``tensor`` into, with the placements that files describe."""
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, dtype=dtype)
    made: Tensor = empty(tensor.shape, dtype=dtype, device_mesh=tensor.device_mesh, placements=in_one_piece(tensor))
    return made


def put_back(value: Any, tensors: StateDict) -> Any:
    if isinstance(value, str) and value.startswith(ELSEWHERE):
        return tensors[value.removeprefix(ELSEWHERE)]
    if isinstance(value, Mapping):
        return {name: put_back(each, tensors) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(put_back(each, tensors) for each in value)
    return value


def whole_on_main(state: StateDict, world: World) -> dict[str, Tensor]:
    """The whole tensors on the CPU of the main process, gathered one by one; an empty dictionary on the others."""
    found = {}
    holders = who_holds(state, world) if world.degrees.pipeline > 1 else {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if holder := holders.get(name, 0):
            full = sent_to_main(full.detach(), holder, world)
        if world.is_main:
            found[name] = full.detach().to('cpu', copy=True)
    return found


def who_holds(state: StateDict, world: World) -> dict[str, int]:
    """The rank of the first process that holds each tensor."""
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, [name for name, tensor in state.items() if not tensor.is_meta])
    return {name: rank for rank, names in reversed(list(enumerate(everywhere))) for name in names}


def sent_to_main(tensor: Shaped[Tensor, '...'], holder: int, world: World) -> Shaped[Tensor, '...']:
    if world.rank == holder:
        dist.send(tensor.contiguous(), 0)
    elif world.is_main:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
        dist.recv(tensor, holder)
    return tensor


def digests_of(folder: Path, world: World) -> dict[str, Any]:
    """The checksums of the files that this process wrote."""
    own = sorted(folder.glob(f'__{world.rank}_*')) + ([folder / PARTS] if world.is_main else [])
    return {path.name: files.entry_of(path) for path in own}


def verify(path: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """The manifest, after this process has verified its share of the files."""
    manifest = files.read_json(path / files.MANIFEST)
    try:
        entries = sorted(dict(manifest['files']).items())
        int(manifest['step'])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path / files.MANIFEST} is not the manifest of a checkpoint ({error!r})') from error
    for name, entry in entries[rank::size]:
        files.check_entry(path / name, entry)
    return dict(manifest)


def verified(path: Path, world: World) -> dict[str, Any]:
    """The manifest, after all processes have verified the files, each a share.

    Errors: ``CheckpointError`` in all processes if one finds a damaged file.
    """
    manifest, wrong = {}, ''
    try:
        manifest = verify(path, world.rank, world.size)
    except CheckpointError as failure:
        wrong = str(failure)
    everywhere: list[Any] = [''] * world.size
    dist.all_gather_object(everywhere, wrong, group=world.patient)
    if told := [each for each in everywhere if each]:
        raise CheckpointError(told[0])
    return manifest


def read(
    path: Path, template: Callable[[str, Any], Shaped[Tensor, '...']]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights, tensors of the state by path, the state with placeholders).

    Args:
        template: (path, metadata) -> the empty tensor to read into, whole or this process's part. One on the meta device is not
            read.
    """
    state = torch.load(path / files.STATE, map_location='cpu', weights_only=True)
    metadata = FileSystemReader(path).read_metadata()
    wanted = {name: template(name, entry) for name, entry in tensors_of(metadata) if not name.startswith(FOR_USE)}
    try:
        here = {name: tensor for name, tensor in wanted.items() if not tensor.is_meta}
        load(here, checkpoint_id=path, no_dist=not dist.is_initialized())
    except Exception as error:
        raise CheckpointError(f'{path} does not fit the model of this run: {str(error).splitlines()[0]}') from error
    weights = {name.removeprefix('model.'): tensor for name, tensor in wanted.items() if name.startswith('model.')}
    return weights, wanted, state


def tensors_of(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            yield name, entry


def read_named(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names have this prefix, without the prefix."""
    entries = [(name, entry) for name, entry in tensors_of(FileSystemReader(path).read_metadata()) if name.startswith(prefix)]
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # as it should be here
        load(dict(found), checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_whole(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, weights, state) for one process, as ``load_checkpoint`` gives them."""
    manifest = verify(path)
    weights, tensors, state = read(path, lambda name, entry: torch.empty(entry.size, dtype=entry.properties.dtype))
    return int(manifest['step']), weights, put_back(state, tensors)
