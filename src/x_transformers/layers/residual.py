"""Residual connections: how a branch reads the stream and writes to it.

A *residual path* reads what the branch is to see from the stream, and writes the branch's output back. *Streams* says what the
stream is made of between entering and leaving the stack: one tensor, several in parallel, or two with different wiring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.helpers import l2norm, without_component
from x_transformers.layers.plan import block_size
from x_transformers.layers.slots import SECOND, accepts
from x_transformers.module import Module, empty_parameter, is_bare
from x_transformers.tensor_types import Float
from x_transformers.unit_weights import UnitGain

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.plan import LayerSpec

Norm = Callable[[Tensor], Tensor]


class ResidualPath(Module):
    """One layer's way around its branch. It is called with what the branch said and what ``read`` left over.

    ``name`` is the flag that chooses it. One that ``looks_around`` is given ``around``, too: which tokens there are, and the
    layer's cache. ``is_causal``: tokens see no later ones.
    """

    name: ClassVar[str]
    looks_around = False
    is_causal = False

    @classmethod
    def is_on(cls, flags: StackFlags) -> bool:
        return bool(getattr(flags, cls.name))

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        raise NotImplementedError

    def read(self, streams: Float[Tensor, '... n d']) -> tuple[Tensor, Any]:
        """(what the branch sees, what ``write`` needs)."""
        raise NotImplementedError

    def write(self, out: Float[Tensor, 'b n d'], rest: Any) -> Tensor:
        """The streams, with the branch's output."""
        raise NotImplementedError

    def norm_after(self, norm: Norm, streams: Float[Tensor, '... n d']) -> Tensor:
        """Post-norm of the streams that have one."""
        return norm(streams)

    def prepare(self, residual: Float[Tensor, '... n d']) -> tuple[Tensor, Any, dict[str, Any]]:
        """``read`` as the original has it: (branch input, residual, keywords for ``forward``)."""
        branch_input, rest = self.read(residual)
        return branch_input, rest, {}

    def forward(self, x: Float[Tensor, 'b n d'], residual: Any, **kwargs: Any) -> Tensor:
        return self.write(x, residual)


def read_foreign(residual: nn.Module, streams: Float[Tensor, '... n d']) -> tuple[Tensor, Any]:
    """(what the branch sees, what is left for ``write``), of a way around a branch that is no ``ResidualPath``.

    It may have a ``prepare``, which returns the two and keywords for its forward, as in 2.16.1.
    """
    prepare = getattr(residual, 'prepare', None)
    if prepare is None:
        return streams, (streams, {})
    h, rest, keywords = prepare(streams)
    return h, (rest, keywords)


def write_stream(residual: nn.Module, out: Float[Tensor, 'b n d'], rest: Any, around: Any = None) -> Tensor:
    """The streams, with the branch's output: ``residual(out, stream)``; a module with one input changes what is added."""
    written: Tensor
    if isinstance(residual, ResidualPath):
        if residual.looks_around:
            written = residual(out, rest, around=around)
        elif type(residual).forward is ResidualPath.forward and is_bare(residual):
            written = residual.write(out, rest)
        else:
            written = residual(out, rest)
        return written
    stream, keywords = rest
    written = residual(out, stream, **keywords) if accepts(residual, SECOND) else stream + residual(out)
    return written


class ScaledStream(ResidualPath):
    """One stream, times a learned gain per feature (``scale_residual``) before a branch is added to it."""

    def __init__(self, dim: int, scale_residual: bool = False) -> None:
        super().__init__()
        self.residual_scale = empty_parameter(dim) if scale_residual else None
        self.init_own()

    def init_own(self) -> None:
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)

    def scaled(self, stream: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        return stream if self.residual_scale is None else stream * self.residual_scale

    def read(self, streams: Float[Tensor, 'b n d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'b n d']]:
        return streams, streams


class Residual(ScaledStream):
    """``out + c * (a * stream)``, with a learned gain per feature ``a`` (``scale_residual``) and a constant ``c``."""

    @classmethod
    def is_on(cls, flags: StackFlags) -> bool:
        """Where no other is."""
        return True

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        settings = {'scale_residual': flags.learns_residual_scale, 'scale_residual_constant': flags.scale_residual_constant}
        return cls(flags.dim, **{**settings, **flags.residual_fn_kwargs})

    def __init__(self, dim: int, scale_residual: bool = False, scale_residual_constant: float = 1.0, **kwargs: Any) -> None:
        super().__init__(dim, scale_residual)
        self.scale_residual_constant = scale_residual_constant

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        if self.residual_scale is not None:
            rest = rest * self.residual_scale
        if self.scale_residual_constant != 1.0:
            rest = rest * self.scale_residual_constant
        return out + rest


class OrthogonalResidual(Residual):
    """Adds what is orthogonal to the stream, token by token: ``stream + out - (out along stream)``.

    https://arxiv.org/abs/2505.11881. The original takes all tokens of a row as one vector, which shows a token the later ones.
    """

    name = 'orthog_residual'

    @classmethod
    def is_on(cls, flags: StackFlags) -> bool:
        return flags.orthog_residual

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        return cls(flags.dim, **{'scale_residual': flags.learns_residual_scale, **flags.residual_fn_kwargs})

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        rest = self.scaled(rest)
        return rest + without_component(out, rest)


class SphereResidual(ResidualPath):
    """nGPT, https://arxiv.org/abs/2410.01131: ``norm(stream + |a| (norm(out) - stream))`` on the sphere of unit length.

    ``a``: a learned share per feature that starts at ``rate``.
    """

    name = 'ngpt'

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        return cls(flags.dim, **flags.residual_fn_kwargs)

    def __init__(self, dim: int, rate: float = 0.05, **kwargs: Any) -> None:
        super().__init__()
        self.share = UnitGain(dim, held=dim**-0.5, start=rate)

    def read(self, streams: Float[Tensor, 'b n d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'b n d']]:
        return streams, streams

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        return l2norm(rest + self.share().abs().to(rest.dtype) * (l2norm(out) - rest))


class GRUGating(ScaledStream):
    """A GRU cell per token: the branch's output is its input, the stream its state; https://arxiv.org/abs/1910.06764."""

    name = 'gate_residual'

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        return cls(flags.dim, **{'scale_residual': flags.learns_residual_scale, **flags.residual_fn_kwargs})

    def __init__(self, dim: int, scale_residual: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, scale_residual)
        self.gru = nn.GRUCell(dim, dim)

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        gated: Tensor = self.gru(out.flatten(0, -2), self.scaled(rest).flatten(0, -2).to(out.dtype))
        return gated.view_as(out)


class ResiDual(ResidualPath):
    """Post-norm and pre-norm at once, https://arxiv.org/abs/2304.14802.

    Of the two streams the first is normed after every layer and is what branches see; the second only adds the branches'
    outputs up, times ``scale``. The stack's output is the first plus the norm of the second, so a small ``scale`` keeps
    half precision from overflowing and changes nothing else.
    """

    name = 'resi_dual'

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        return cls(scale=flags.resi_dual_scale, **flags.residual_fn_kwargs)

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__()
        self.scale = scale

    def read(self, streams: Float[Tensor, '2 b n d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, '2 b n d']]:
        return streams[0], streams

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, '2 b n d']) -> Float[Tensor, '2 b n d']:
        return torch.stack((rest[0] + out, rest[1] + self.scale * out))

    def norm_after(self, norm: Norm, streams: Float[Tensor, '2 b n d']) -> Float[Tensor, '2 b n d']:
        return torch.stack((norm(streams[0]), streams[1]))


class ParallelBlock(ResidualPath):
    """Layers of a block side by side, https://arxiv.org/abs/2204.02311: all read what enters the block, and its end is the sum.

    Of the two streams the first is what layers of the block read; the second adds up. The ``first`` layer begins with the sum.
    """

    name = 'parallel_block'

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        return cls(first=spec.index % block_size(flags) == 0, **flags.residual_fn_kwargs)

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def read(self, streams: Float[Tensor, '2 b n d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, '2 b n d']]:
        return streams[int(self.first)], streams

    def write(self, out: Float[Tensor, 'b n d'], rest: Float[Tensor, '2 b n d']) -> Float[Tensor, '2 b n d']:
        return torch.stack((rest[int(self.first)], rest[1] + out))


class SingleStream:
    """One tensor from the first layer to the last."""

    count = 1

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Tensor:
        return x

    def close(self, streams: Float[Tensor, '... n d'], norm: Norm) -> Float[Tensor, 'b n d']:
        """The stack's output; ``norm`` is the final one."""
        return norm(streams)

    def last(self, streams: Float[Tensor, '... n d']) -> Tensor:
        """What is reported as the last hidden state before the final norm."""
        return streams

    def beside(self, x: Float[Tensor, 'b n d']) -> Tensor:
        """Something per token, in such a shape that it can be added to the streams."""
        return x

    def condition(self, condition: Float[Tensor, 'b ... c']) -> Tensor:
        """A condition per row of the batch, as the streams' rows need it."""
        return condition


class UnitStream(SingleStream):
    """One tensor, every token of unit length."""

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Tensor:
        return l2norm(x)


class ParallelStreams(SingleStream):
    """``count`` tensors in the batch axis, (b s) n d, told apart by a learned embedding; their sum leaves the stack."""

    def __init__(self, count: int) -> None:
        self.count = count

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Float[Tensor, '(b s) n d']:
        streams = x.unsqueeze(1).expand(-1, self.count, -1, -1)
        if embedding is not None:
            streams = streams + embedding.unsqueeze(-2)
        return streams.flatten(0, 1)

    def close(self, streams: Float[Tensor, '(b s) n d'], norm: Norm) -> Float[Tensor, 'b n d']:
        return norm(streams.unflatten(0, (-1, self.count)).sum(dim=1))

    def condition(self, condition: Float[Tensor, 'b ... c']) -> Tensor:
        return condition.repeat_interleave(self.count, dim=0)

    def beside(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, '(b s) n d']:
        return x.repeat_interleave(self.count, dim=0)


class BlockStreams(SingleStream):
    """The two streams of ``ParallelBlock``, 2 b n d; the sum leaves the stack."""

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Float[Tensor, '2 b n d']:
        return torch.stack((x, x))

    def close(self, streams: Float[Tensor, '2 b n d'], norm: Norm) -> Float[Tensor, 'b n d']:
        return norm(streams[1])

    def last(self, streams: Float[Tensor, '2 b n d']) -> Float[Tensor, 'b n d']:
        return streams[1]


class DualStreams(SingleStream):
    """The two streams of ``ResiDual``, 2 b n d."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def open(self, x: Float[Tensor, 'b n d'], embedding: Float[Tensor, 's d'] | None = None) -> Float[Tensor, '2 b n d']:
        return torch.stack((x, x * self.scale))

    def close(self, streams: Float[Tensor, '2 b n d'], norm: Norm) -> Float[Tensor, 'b n d']:
        return streams[0] + norm(streams[1])

    def last(self, streams: Float[Tensor, '2 b n d']) -> Float[Tensor, 'b n d']:
        return streams[0]
