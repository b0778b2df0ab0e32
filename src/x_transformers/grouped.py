"""Linear maps of many experts, applied to rows sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from x_transformers.helpers import autocast_dtype, writes_program
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float, Int


class GroupedLinear(Module):
    """One linear map for each expert, on rows that are sorted by expert.

    forward: (m in), how many of the rows belong to each expert (e) -> (m out). ``zero``: they start at zero; ``depth``: with
    variance 1 / (2 · in · depth).
    """

    decayed_parameters = ('weight',)

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, experts: int, dim_in: int, dim_out: int, bias: bool, *, zero: bool = False, depth: int | None = None
    ) -> None:
        super().__init__()
        self.zero, self.depth = zero, depth
        self.weight = empty_parameter(experts, dim_out, dim_in)
        self.bias = empty_parameter(experts, dim_out) if bias else None
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        width = self.weight.shape[-1]
        bound = 0.0 if self.zero else width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.depth is not None and not self.zero:
            nn.init.normal_(self.weight, std=(2 * width * self.depth) ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, 'm i'], counts: Int[Tensor, ' e']) -> Float[Tensor, 'm o']:
        x, weight, bias = same_precision(x, self.weight, self.bias)
        if has_kernel(x, weight):
            return in_one_product(x, weight, bias, counts)
        if torch.compiler.is_compiling():
            # one node of the graph, whatever the counts are
            out: Tensor = torch.ops.x_transformers.grouped_linear(x, weight, bias, counts)
            return out
        return by_group(x, weight, bias, sizes_of(counts, x.shape[0]))

    def of_all(self, x: Float[Tensor, '#e t i']) -> Float[Tensor, 'e t o']:
        """The map of every expert on the same rows, or on rows of its own."""
        out = x @ self.weight.transpose(1, 2)
        return out if self.bias is None else out + self.bias.unsqueeze(1)


def same_precision(
    x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], bias: Float[Tensor, 'e o'] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the precision that autocast, if it is on, wants of a linear map."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def sizes_of(counts: Int[Tensor, ' e'], rows: int) -> list[int]:
    """The counts as numbers; on a device without values, as even as can be."""
    if counts.is_meta or isinstance(counts, FakeTensor):
        return [len(part) for part in torch.arange(rows, device='cpu').tensor_split(counts.shape[0])]
    sizes: list[int] = counts.tolist()
    return sizes


def by_group(
    x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], bias: Float[Tensor, 'e o'] | None, sizes: list[int]
) -> Float[Tensor, 'm o']:
    """One product for each expert. Gradients of all weights are put together once."""
    biases = [None] * len(sizes) if bias is None else bias.unbind(0)
    parts = zip(x.split(sizes), weight.unbind(0), biases, strict=True)
    return torch.cat([F.linear(rows, its_weight, its_bias) for rows, its_weight, its_bias in parts])


def has_kernel(x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i']) -> bool:
    """Whether torch has a kernel for all experts at once: on a GPU, in bfloat16, rows of whole 16 bytes.

    It reads the counts on the device, so that nobody waits for them. Elsewhere it is a loop, and no faster than ours.
    """
    return x.is_cuda and x.dtype == torch.bfloat16 and all(width % 8 == 0 for width in weight.shape[1:])


def in_one_product(
    x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], bias: Float[Tensor, 'e o'] | None, counts: Int[Tensor, ' e']
) -> Float[Tensor, 'm o']:
    """``by_group`` as one operation of torch."""
    out: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    return out if bias is None else out + bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])


# torch cannot read the schema from annotations that name shapes
@torch.library.custom_op(
    'x_transformers::grouped_linear',
    mutates_args=(),
    schema='(Tensor x, Tensor weight, Tensor? bias, Tensor counts) -> Tensor',
)
def grouped_linear(
    x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], bias: Float[Tensor, 'e o'] | None, counts: Int[Tensor, ' e']
) -> Tensor:
    return by_group(x, weight, bias, sizes_of(counts, x.shape[0]))


@grouped_linear.register_fake
def _(
    x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], bias: Float[Tensor, 'e o'] | None, counts: Int[Tensor, ' e']
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    'x_transformers::grouped_linear_backward',
    mutates_args=(),
    schema='(Tensor grad, Tensor x, Tensor weight, Tensor counts) -> (Tensor, Tensor, Tensor)',
)
def grouped_linear_backward(
    grad: Float[Tensor, 'm o'], x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], counts: Int[Tensor, ' e']
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, weights and biases."""
    sizes = sizes_of(counts, x.shape[0])
    by_expert = list(zip(grad.split(sizes), x.split(sizes), weight.unbind(0), strict=True))
    rows = torch.cat([its_grad @ its_weight for its_grad, _, its_weight in by_expert])
    weights = torch.stack([its_grad.t() @ its_rows for its_grad, its_rows, _ in by_expert])
    return rows, weights, torch.stack([its_grad.sum(dim=0) for its_grad, _, _ in by_expert])


@grouped_linear_backward.register_fake
def _(
    grad: Float[Tensor, 'm o'], x: Float[Tensor, 'm i'], weight: Float[Tensor, 'e o i'], counts: Int[Tensor, ' e']
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


def _keep(
    ctx: object,
    inputs: tuple[Float[Tensor, 'm i'], Float[Tensor, 'e o i'], Float[Tensor, 'e o'] | None, Int[Tensor, ' e']],
    output: Float[Tensor, 'm o'],
) -> None:
    x, weight, bias, counts = inputs
    ctx.save_for_backward(x, weight, counts)  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _back(ctx: object, grad: Float[Tensor, 'm o']) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    rows, weights, biases = torch.ops.x_transformers.grouped_linear_backward(grad.contiguous(), x, weight, counts)
    return rows, weights, biases if ctx.has_bias else None, None  # type: ignore[attr-defined]


grouped_linear.register_autograd(_back, setup_context=_keep)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is running, under which numbers may not be read off tensors."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


# ---------------------------------------------------------------- rows to the experts and back


class Dispatch(torch.autograd.Function):
    """``dispatch`` and, with ``sums``, ``combine``.

    Each is the adjoint of the other. So nothing is added up by place, which a GPU does slowly, and in another order each time.
    """

    @staticmethod
    def forward(
        x: Float[Tensor, 'r d'], order: Int[Tensor, ' m'], back: Int[Tensor, ' m'], active: int, sums: bool
    ) -> Float[Tensor, 's d']:
        if not sums:
            return x.index_select(0, order // active)
        summed: Tensor = x.index_select(0, back).unflatten(0, (-1, active)).sum(dim=1)
        return summed

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Float[Tensor, 'r d'], Int[Tensor, ' m'], Int[Tensor, ' m'], int, bool],
        output: Float[Tensor, 's d'],
    ) -> None:
        _, order, back, ctx.active, ctx.sums = inputs
        ctx.save_for_backward(order, back)
        ctx.save_for_forward(order, back)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, 's d']) -> tuple[Tensor, None, None, None, None]:
        order, back = ctx.saved_tensors
        return Dispatch.run(grad, order, back, ctx.active, not ctx.sums), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Float[Tensor, 'r d'], *_: None) -> Float[Tensor, 's d']:
        order, back = ctx.saved_tensors
        return Dispatch.run(x, order, back, ctx.active, ctx.sums)

    @staticmethod
    def run(
        x: Float[Tensor, 'r d'], order: Int[Tensor, ' m'], back: Int[Tensor, ' m'], active: int, sums: bool
    ) -> Float[Tensor, 's d']:
        if writes_program():  # which finds the way back by itself
            return Dispatch.forward(x, order, back, active, sums)
        out: Tensor = Dispatch.apply(x, order, back, active, sums)  # type: ignore[no-untyped-call]
        return out


def dispatch(x: Float[Tensor, 't d'], order: Int[Tensor, ' m'], back: Int[Tensor, ' m'], active: int) -> Float[Tensor, 'm d']:
    """The rows of ``x``, each ``active`` times, in ``order``; ``back`` puts them in order again."""
    return Dispatch.run(x, order, back, active, sums=False)


def combine(x: Float[Tensor, 'm d'], order: Int[Tensor, ' m'], back: Int[Tensor, ' m'], active: int) -> Float[Tensor, 't d']:
    """The sum over the ``active`` rows of ``x`` that belong together once they are put ``back``."""
    return Dispatch.run(x, order, back, active, sums=True)
