"""Distributed checkpoints: each process writes its part, and any number of processes reads (torch.distributed.checkpoint).

A folder ``checkpoint-NNNNNNNN`` holds the parts, what is no tensor (``state.pt``), the whole weights for use
(``export.safetensors``) and a manifest with checksums. It is renamed into place once all of it is on disk.
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

PARTS = '.metadata'  # the file by which such a checkpoint is known
ELSEWHERE = 'tensor:'  # stands in state.pt for a tensor that lies in the parts
FOR_USE = 'export.'  # in front of the names of weights for use, where they are not those that training goes on with
SPREAD = ('optimizers', 'averaged')  # what of the state has the shapes of parameters


def is_distributed(path: Path) -> bool:
    return (path / PARTS).exists()


class DistributedCheckpoints:
    """The checkpoints of one run folder; every process calls every method.

    Training waits while each process copies its part into its own memory. All else is done in a thread, whose messages go
    through a group of their own.
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
        """All processes together. ``for_use``: how the names of the weights for use begin."""
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
        """What every process gets out of ``act``; when one of them fails, all do, and earlier checkpoints are untouched."""
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
        """Those completed since the last call, in the same step in all processes.

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
        """Until the last checkpoint is on disk.

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
    """The same tree with a word in the place of each tensor, which goes to ``tensors`` unless another process has it."""
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
    """One tree of those of all stages, where each has what belongs to its parameters."""
    first = trees[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for tree in trees for name in tree)
        return {name: joined([tree[name] for tree in trees if name in tree]) for name in names}
    if isinstance(first, (list, tuple)):
        return type(first)(joined(parts) for parts in zip(*trees, strict=True))
    return first


def in_order(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
    """The same, spread in such a way that each process has one piece of it: what files can describe."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    moved: Tensor = tensor.redistribute(placements=in_one_piece(tensor))
    return moved.detach()


def in_one_piece(tensor: DTensor) -> list[Placement]:
    """Where a process has rows here and there, as many that lie together."""
    return [Shard(place.dim) if isinstance(place, _StridedShard) else place for place in tensor.placements]


def empty_like(tensor: Shaped[Tensor, '...'], dtype: torch.dtype) -> Shaped[Tensor, '...']:
    """For what is read into the place of ``tensor``, which may have to be spread otherwise afterwards."""
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
    """The whole tensors on the CPU of the main process, one after the other; nothing elsewhere."""
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
    """The first process that has the numbers of a tensor."""
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
    """Of the files that this process has written."""
    own = sorted(folder.glob(f'__{world.rank}_*')) + ([folder / PARTS] if world.is_main else [])
    return {path.name: files.entry_of(path) for path in own}


def verify(path: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """The manifest, once this process's share of the files has been compared with it."""
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
    """The same, where each process compares a share of the files.

    Errors: ``CheckpointError`` in all of them for what one has found.
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
    """(weights, the tensors of the state by their paths, the state with words in their places).

    Args:
        template: (path, metadata) -> an empty tensor of the form in which it is wanted: whole, or this process's part; one on
            the meta device is not read.
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
    """The whole tensors whose names begin so, without their beginnings."""
    entries = [(name, entry) for name, entry in tensors_of(FileSystemReader(path).read_metadata()) if name.startswith(prefix)]
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # which is what is wanted here
        load(dict(found), checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_whole(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, weights, state) for one process, as ``load_checkpoint`` gives them."""
    manifest = verify(path)
    weights, tensors, state = read(path, lambda name, entry: torch.empty(entry.size, dtype=entry.properties.dtype))
    return int(manifest['step']), weights, put_back(state, tensors)
