"""What one row of tokens costs a device: operations and memory, layer by layer. Found on tensors that have no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from x_transformers.distributed.mesh import Degrees, MeshError, World
from x_transformers.distributed.parallelize import parallelize
from x_transformers.distributed.units import layers_of
from x_transformers.module import own_part
from x_transformers.training.build import build_model


@dataclass(frozen=True)
class TensorGroup:
    """What processes of a tensor group share."""

    tensor: int = 1
    sequence_parallel: bool = False
    loss_parallel: bool = False


@dataclass(frozen=True)
class Row:
    """In front of the layers, in each that is executed, and behind them. A row's forward and backward."""

    kept: tuple[int, ...]  # bytes for the backward, beside the parameters
    flops: tuple[float, ...]
    entering: tuple[int, ...]  # bytes of the streams, at each layer


def costs_of(flags: Mapping[str, Any], vocabulary: int, seq_len: int, half: bool, group: TensorGroup) -> Row:
    """Errors: ``FlagError`` and ``MeshError`` as for a model that is trained so."""
    from x_transformers.cli.info import halve

    with pretended(group.tensor) as world, FakeTensorMode(allow_non_fake_inputs=True), torch.device('cpu'):
        model = build_model(flags, vocabulary).train()
        if half:
            halve(model)
        cut(model, world, group)
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        kept = kept_by_layer(model, ids)
        entering: list[int] = []
        counter = FlopCounterMode(display=False)
        # a backward has twice the operations of a forward
        flops = by_layer(model, lambda: 3.0 * counter.get_total_flops(), lambda: run_counted(model, ids, counter), entering)
    return Row(tuple(kept), tuple(flops), tuple(entering))


def run_counted(model: nn.Module, ids: Tensor, counter: FlopCounterMode) -> None:
    with torch.no_grad(), counter:
        model(ids)


def kept_by_layer(model: nn.Module, ids: Tensor) -> list[int]:
    """Bytes of storages that a forward keeps, those of parameters left out, each where it is kept first."""
    kept: dict[int, Tensor] = {}
    own = {own_part(parameter).untyped_storage()._cdata for parameter in model.parameters()}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = own_part(tensor).untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            # the tensor is held, so that no other one takes its place
            kept[storage._cdata] = tensor
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return [int(each) for each in by_layer(model, lambda: total, lambda: model(ids), [])]


def by_layer(model: nn.Module, read: Callable[[], float], run: Callable[[], Any], entering: list[int]) -> list[float]:
    """How much ``read`` grows in front of the layers, in each of them as ``run`` calls it, and behind."""
    inside: list[float] = []
    started = 0.0
    front: list[float] = []

    def begin(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal started
        started = read()
        front.append(started)
        entering.append(own_part(args[0]).nbytes)

    def end(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        inside.append(read() - started)

    hooks = [
        hook for each in layers_of(model) for hook in (each.register_forward_pre_hook(begin), each.register_forward_hook(end))
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    before = front[0] if front else 0.0
    return [before, *inside, read() - before - sum(inside)]


def own_parameters(flags: Mapping[str, Any], vocabulary: int, group: TensorGroup) -> nn.Module:
    """The model without numbers, as a process of a tensor group has it."""
    if group.tensor == 1:
        with torch.device('meta'):
            return build_model(flags, vocabulary)
    # a model on the meta device would be filled when it is cut
    with pretended(group.tensor) as world, FakeTensorMode(allow_non_fake_inputs=True), torch.device('cpu'):
        model = build_model(flags, vocabulary)
        cut(model, world, group)
    return model


def cut(model: nn.Module, world: World | None, group: TensorGroup) -> None:
    if world is not None:
        parallelize(model, world, sequence_parallel=group.sequence_parallel, loss_parallel=group.loss_parallel)


@contextmanager
def pretended(tensor: int) -> Iterator[World | None]:
    """A tensor group of so many processes, of which there is one. None: nothing is shared.

    Errors: ``MeshError`` where there are processes already.
    """
    if tensor == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise MeshError('a plan with --tensor must be made in one process, got several. Start it without torchrun.')
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=tensor)
    try:
        mesh = init_device_mesh('cpu', (1, 1, tensor), mesh_dim_names=('replicate', 'shard', 'tensor'))
        yield World(mesh, Degrees(tensor=tensor), torch.device('cpu'), 0, tensor)
    finally:
        dist.destroy_process_group()
