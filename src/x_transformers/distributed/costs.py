"""Operations and memory of one row of tokens, layer by layer, computed on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from x_transformers.distributed.context import Sliced
from x_transformers.distributed.mesh import Degrees, MeshError, World
from x_transformers.distributed.parallelize import Checkpointing, checkpoint_layers, parallelize
from x_transformers.distributed.units import layers_of
from x_transformers.module import own_part
from x_transformers.tensor_types import Shaped
from x_transformers.training.build import build_model


@dataclass(frozen=True)
class RowGroup:
    """How many processes share the same rows: by heads and features, by slices of the sequence, by the vocabulary."""

    tensor: int = 1
    sequence_parallel: bool = False
    loss_parallel: bool = False
    context: int = 1

    @property
    def size(self) -> int:
        return self.tensor * self.context


@dataclass(frozen=True)
class Row:
    """The cost of one row, forward and backward: before the layers, in each executed layer, and after them."""

    kept: tuple[int, ...]  # bytes saved for the backward, without parameters
    flops: tuple[float, ...]
    entering: tuple[int, ...]  # bytes of the streams, at each layer


def costs_of(flags: Mapping[str, Any], vocabulary: int, seq_len: int, half: bool, group: RowGroup, again: bool = False) -> Row:
    """The cost of a row. ``again``: with layers that are recomputed for their gradients.

    Errors: ``FlagError`` and ``MeshError`` as for a model that is trained so.
    """
    from x_transformers.cli.info import halve

    with pretended(group) as world, FakeTensorMode(allow_non_fake_inputs=True), torch.device('cpu'):
        model = build_model(flags, vocabulary).train()
        if half:
            halve(model)
        cut(model, world, group, again)
        forward = model if world is None or group.context == 1 else Sliced(model, world.context_mesh)
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        kept = kept_by_layer(model, lambda: forward(ids))
        entering: list[int] = []
        counter = FlopCounterMode(display=False)

        def counted() -> None:
            with torch.no_grad(), counter:
                forward(ids)

        # a backward takes twice the operations of a forward
        flops = by_layer(model, lambda: 3.0 * counter.get_total_flops(), counted, entering)
    return Row(tuple(kept), tuple(flops), tuple(entering))


def kept_by_layer(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """Bytes that a forward saves for its backward, without parameters, counted where each is saved first."""
    kept: dict[int, Tensor] = {}
    own = {own_part(parameter).untyped_storage()._cdata for parameter in model.parameters()}
    total = 0

    def keep(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
        nonlocal total
        storage = own_part(tensor).untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            # keep the tensor, so that its memory is not used by another one
            kept[storage._cdata] = tensor
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return [int(each) for each in by_layer(model, lambda: total, run, [])]


def by_layer(model: nn.Module, read: Callable[[], float], run: Callable[[], Any], entering: list[int]) -> list[float]:
    """The growth of ``read`` before the layers, in each layer that ``run`` executes, and after them."""
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


def own_parameters(flags: Mapping[str, Any], vocabulary: int, group: RowGroup) -> nn.Module:
    """The model on the meta device, as one process of a tensor group holds it."""
    if group.tensor == 1:
        with torch.device('meta'):
            return build_model(flags, vocabulary)
    # cutting fills a model on the meta device
    with pretended(group) as world, FakeTensorMode(allow_non_fake_inputs=True), torch.device('cpu'):
        model = build_model(flags, vocabulary)
        cut(model, world, group)
    return model


def cut(model: nn.Module, world: World | None, group: RowGroup, again: bool = False) -> None:
    how: Checkpointing = 'full' if again else 'none'
    if world is not None and group.tensor > 1:
        alone = replace(world, degrees=Degrees(tensor=group.tensor))
        parallelize(
            model, alone, checkpoint=how, sequence_parallel=group.sequence_parallel, loss_parallel=group.loss_parallel
        )  # fmt: skip
    elif again:
        checkpoint_layers(model, how)


@contextmanager
def pretended(group: RowGroup) -> Iterator[World | None]:
    """A simulated process group in which this process has the last slice, with the most keys. None: nothing is shared.

    Errors: ``MeshError`` where there are processes already.
    """
    if group.size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise MeshError(
            'a plan with --tensor or --context must be made in one process, got several. Start it without torchrun.'
        )
    rank, degrees = group.size - group.tensor, Degrees(tensor=group.tensor, context=group.context)
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=group.size)
    try:
        mesh = init_device_mesh('cpu', (1, group.context, group.tensor), mesh_dim_names=('replicate', 'shard', 'tensor'))
        world = World(mesh, degrees, torch.device('cpu'), rank, group.size)
        _ = world.context_mesh  # create it outside of the fake mode
        yield world
    finally:
        dist.destroy_process_group()
