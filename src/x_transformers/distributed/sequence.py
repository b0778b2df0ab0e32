"""Sequence parallelism with tensor groups: between branches, each process holds a slice of the sequence.

A stack slices its input and gathers its output. Norms and residuals run on slices, so a process saves only its own rows of
their results. A branch gets all rows, and returns a slice of the sum over the processes. A branch with a wrapper that mixes
neighbouring tokens, or with dropout, runs on all rows on every process.

A call without gradients, with memories or a cache, or that returns hidden states, runs without slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from x_transformers.attention.attention import Attention
from x_transformers.distributed.moves import SlicedInputs, Swap, all_rows, copied, entries_of, length_of, slice_of
from x_transformers.distributed.units import stacks_of
from x_transformers.feedforward import FeedForward
from x_transformers.layers.branch import change_first
from x_transformers.layers.layer import Layer
from x_transformers.layers.residual import Norm, ResidualPath
from x_transformers.layers.slots import takes_around
from x_transformers.norms import NORMS
from x_transformers.tensor_types import Float

# arguments of a call that need all rows
NEED_ALL = {'cache', 'mems', 'return_hiddens', 'transform_block_inputs'}
# modules of a stack between its layers
BETWEEN = ('skip_combines', 'lambdas', 'mudd')


def slice_stacks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every stack of ``model`` run on slices, in place. Call it before the layers are sharded."""
    for stack in stacks_of(model):
        parallelize_module(stack, mesh, SlicedStack())


def sequence_refusals(model: nn.Module) -> Iterator[str]:
    """One sentence for each module in a layer's slot that may mix rows, or that cannot run on a slice."""
    for stack in stacks_of(model):
        strange = {type(part).__name__ for layer in stack.layers for part in unknown_parts(layer)}
        if strange:
            yield (
                f'modules of your own must be left out with --sequence-parallel, got {", ".join(sorted(strange))}. '
                'Use --tensor alone.'
            )


def unknown_parts(layer: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(layer, Layer):
        yield layer
        return
    for part in (*layer.norms, layer.residual):
        if part is not None and not isinstance(part, (ResidualPath, nn.LayerNorm, nn.RMSNorm, *NORMS.values())):
            yield part
    if not takes_around(layer.branch):
        yield layer.branch


class Slices:
    """The sequence length of the current call; 0: it is not sliced. ``calls`` counts the sliced ones."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.length = 0
        self.calls = 0

    def begin(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get('x')
        size = self.mesh.size()
        needs_all = len(args) > 1 or any(kwargs.get(name, False) not in (None, False) for name in NEED_ALL)
        rows = 0 if x is None or needs_all or not torch.is_grad_enabled() else x.shape[-2]
        # all slices have the same length, rounded up, except the last one, which must not be empty
        self.length = rows if (size - 1) * -(-rows // size) < rows else 0
        self.calls += self.length > 0

    def end(self, *args: Any) -> None:
        self.length = 0

    def cut(self, t: Float[Tensor, '... n d']) -> Float[Tensor, '... m d']:
        return slice_of(t, self.mesh) if self.length else t

    def join(self, t: Float[Tensor, '... m d']) -> Float[Tensor, '... n d']:
        return all_rows(t, self.length, self.mesh, alike=True) if self.length else t


class SlicedStreams:
    """The streams of a stack, sliced from its input to its output."""

    def __init__(self, whole: Any, slices: Slices) -> None:
        self.whole, self.slices = whole, slices

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Float[Tensor, '... m d']:
        return self.slices.cut(self.whole.open(x, embedding))

    def close(self, streams: Float[Tensor, '... m d'], norm: Norm) -> Float[Tensor, 'b n d']:
        out: Tensor = self.whole.close(self.slices.join(streams), norm)
        return out

    def beside(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, '... m d']:
        return self.slices.cut(self.whole.beside(x))


class SlicedStack(ParallelStyle):
    """Slices a stack and the modules between its layers."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        stack: Any = module
        slices = Slices(device_mesh)
        stack.streams = SlicedStreams(stack.streams, slices)
        stack.register_forward_pre_hook(slices.begin, with_kwargs=True)
        stack.register_forward_hook(slices.end, always_call=True)
        for name in BETWEEN:
            for part in children_of(getattr(stack, name)):
                between = Between(slices, Swap(entries_of(part), device_mesh))
                part.register_forward_pre_hook(between.enter)
                part.register_forward_hook(between.leave, always_call=True)
        mixtures = {part: Swap(entries_of(part), device_mesh) for part in children_of(stack.layer_integrators)}
        for layer in stack.layers:
            parallelize_module(layer, device_mesh, SlicedLayer(slices, mixtures))
        return module


def children_of(parts: nn.Module | None) -> list[nn.Module]:
    """The modules of a list, without None; or a single module."""
    if isinstance(parts, nn.ModuleList):
        return [part for part in parts if part is not None]
    return [] if parts is None else [parts]


class Between:
    """A module between layers, which runs on slices when its stack does."""

    def __init__(self, slices: Slices, swap: Swap) -> None:
        self.slices, self.swap = slices, swap

    def enter(self, *args: Any) -> None:
        if self.slices.length:
            self.swap.enter()

    def leave(self, *args: Any) -> None:
        self.swap.leave()


class SlicedLayer(ParallelStyle):
    """Slices a layer. Its inputs say whether it runs on slices, as it may be recomputed outside of its stack."""

    def __init__(self, slices: Slices, mixtures: dict[nn.Module, Swap]) -> None:
        super().__init__()
        self.slices, self.mixtures = slices, mixtures

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer: Any = module
        self.swap = Swap(entries_of(layer, without=frozenset(layer.branch.modules())), device_mesh)
        layer.register_forward_pre_hook(self.enter)
        layer.register_forward_hook(self.leave, always_call=True)
        layer.branch.register_forward_pre_hook(self.enter_branch, with_kwargs=True)
        layer.branch.register_forward_hook(self.leave_branch, with_kwargs=True)
        return module

    def enter(self, layer: Layer, args: Any) -> Any:
        streams, condition, wide_condition, around = args
        if not isinstance(around.inputs, SlicedInputs):
            around.inputs = SlicedInputs.of(around.inputs, self.slices.length)
            around.injected = self.part(around.injected, around.inputs.whole)
        whole = around.inputs.whole
        if not whole:
            return None
        self.swap.enter()
        if around.mixture is not None:
            self.mixtures[around.mixture].enter()
        return streams, self.part(condition, whole), self.part(wide_condition, whole), around

    def leave(self, *args: Any) -> None:
        self.swap.leave()
        for mixture in self.mixtures.values():
            mixture.leave()

    def part(self, t: Float[Tensor, '... n d'] | None, whole: int) -> Float[Tensor, '... m d'] | None:
        """This process's rows of a tensor per token; a tensor for all tokens stays whole."""
        if t is None or not whole:
            return t
        return slice_of(t, self.slices.mesh) if t.shape[-2] == whole else copied(t, self.slices.mesh)

    def enter_branch(self, branch: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get('around')
        whole = length_of(given)
        if not whole or given is None:
            return None
        mesh = self.slices.mesh
        if takes_slices(branch, given):
            if given.rows is None:
                return None
            tokens = slice_of(given.rows.unsqueeze(-1), mesh).squeeze(-1)
            return args, kwargs | {'around': given.having(rows=tokens)}
        x, *rest = args
        x = all_rows(x, whole, mesh, alike=True)
        return (x, *rest), kwargs | {'around': given.having(whole=0, cut_to=whole)}

    def leave_branch(self, branch: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        given = kwargs.get('around')
        if not isinstance(given, SlicedInputs) or not given.cut_to:
            return None
        return change_first(out, lambda t: slice_of(t, self.slices.mesh))


def takes_slices(branch: nn.Module, given: SlicedInputs) -> bool:
    """Whether a branch's output is only summed, so that each process needs its own rows of the sum."""
    if isinstance(branch, Attention):
        return branch.sublayer_dropout is None
    return (
        isinstance(branch, FeedForward)
        and branch.flags.experts is None
        and branch.flags.sublayer_dropout == 0.0
        and given.deep_embed is None
    )
