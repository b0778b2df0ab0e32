"""The arithmetic of several residual streams, with a custom backward.

Streams are the largest tensors of a model that has them. The formulas alone would keep their norms and products for the
backward, and write and read each several times over; on a CPU this takes twice as long. A compiler does as well by itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.helpers import by_formula, under_transform, writes_program
from x_transformers.tensor_types import Float


def by_hand(*tensors: Float[Tensor, '...']) -> bool:
    """Whether the short way back is worth it here."""
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = all(t.device.type == 'cpu' and t.dtype == tensors[0].dtype for t in tensors)
    in_single = tensors[0].dtype in (torch.float32, torch.float64)
    elsewhere = writes_program() or torch.is_autocast_enabled('cpu') or under_transform()
    return learning and plain and in_single and not elsewhere


# ---------------------------------------------------------------- products of what is normed


def normed_products_formula(
    x: Float[Tensor, '... d'], gain: Float[Tensor, 'd'], weight: Float[Tensor, 'd c'], eps: float
) -> Float[Tensor, '... c']:
    return F.layer_norm(x, x.shape[-1:], gain, None, eps) @ weight


def normed_products(
    x: Float[Tensor, '... d'], gain: Float[Tensor, 'd'], weight: Float[Tensor, 'd c'], eps: float
) -> Float[Tensor, '... c']:
    """``layer_norm(x) @ weight``, for few columns ``c``."""
    if not by_hand(x, gain, weight):
        return normed_products_formula(x, gain, weight, eps)
    out: Tensor = NormedProducts.apply(x, gain, weight, eps)[0]  # type: ignore[no-untyped-call]
    return out


class NormedProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Float[Tensor, '... d'], gain: Float[Tensor, 'd'], weight: Float[Tensor, 'd c'], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return normed @ (gain.unsqueeze(-1) * weight), mean, inverse

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Float[Tensor, '... d'], Float[Tensor, ' d'], Float[Tensor, 'd c'], float],
        output: tuple[Float[Tensor, '...'], ...],
    ) -> None:
        x, gain, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gain, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, '... c'] | None, *_: Float[Tensor, '...'] | None) -> tuple[Tensor | None, ...]:
        x, gain, weight, mean, inverse = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            formula = partial(normed_products_formula, eps=ctx.eps)
            return *by_formula(formula, (x, gain, weight), (grad,)), None
        with torch.autocast(x.device.type, enabled=False):
            shape, whole = x.shape[-1:], gain.unsqueeze(-1) * weight
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad @ whole.t(), x.contiguous(), shape, mean, inverse, None, None, [True, False, False]
            )
            # normed^T grad, without what is normed: (x - mean) * inverse
            shares, rows = (grad * inverse).flatten(0, -2), x.flatten(0, -2).t()
            # one by one, because a product with few columns takes longer than its columns do
            products = torch.stack([rows @ share.contiguous() for share in shares.unbind(-1)], dim=-1)
            grad_whole = products - (mean.flatten(0, -2) * shares).sum(0)
            return grad_x, (grad_whole * weight).sum(-1), gain.unsqueeze(-1) * grad_whole, None


# ---------------------------------------------------------------- reading


def read_formula(x: Float[Tensor, 'b s n d'], share: Float[Tensor, 'b s n']) -> tuple[Tensor, Tensor]:
    return (x * share.unsqueeze(-1)).sum(1), x.sum(1)


def read_streams(
    x: Float[Tensor, 'b s n d'], share: Float[Tensor, 'b s n']
) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'b n d']]:
    """(the streams, each as much as its share; their sum)."""
    streams: tuple[Tensor, Tensor] = ReadStreams.apply(x, share) if by_hand(x, share) else read_formula(x, share)  # type: ignore[no-untyped-call]
    return streams


class ReadStreams(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, 'b s n d'], share: Float[Tensor, 'b s n']) -> tuple[Tensor, Tensor]:
        read = x[:, 0] * share[:, 0].unsqueeze(-1)
        for stream in range(1, x.shape[1]):
            read = torch.addcmul(read, x[:, stream], share[:, stream].unsqueeze(-1))
        return read, x.sum(1)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Float[Tensor, 'b s n d'], Float[Tensor, 'b s n']],
        output: tuple[Float[Tensor, 'b n d'], Float[Tensor, 'b n d']],
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(
        ctx: Any, of_read: Float[Tensor, 'b n d'] | None, of_sum: Float[Tensor, 'b n d'] | None
    ) -> tuple[Tensor | None, ...]:
        x, share = ctx.saved_tensors
        if of_read is None and of_sum is None:
            return None, None
        if torch.is_grad_enabled():
            return by_formula(read_formula, (x, share), (of_read, of_sum))
        if of_read is None:
            return of_sum.unsqueeze(1).expand_as(x) if of_sum is not None else None, None
        shares, each = share.unsqueeze(-1), of_read.unsqueeze(1)
        grad_x = shares * each if of_sum is None else torch.addcmul(of_sum.unsqueeze(1), shares, each)
        of_shares = [(stream * of_read).sum(-1) for stream in x.unbind(1)]
        return grad_x, torch.stack(of_shares, dim=1)


# ---------------------------------------------------------------- writing


def write_formula(carried: Float[Tensor, 'b #s n d'], share: Float[Tensor, 'b s n'], out: Float[Tensor, 'b n d']) -> Tensor:
    return carried + share.unsqueeze(-1) * out.unsqueeze(1)


def write_streams(
    carried: Float[Tensor, 'b #s n d'], share: Float[Tensor, 'b s n'], out: Float[Tensor, 'b n d']
) -> Float[Tensor, 'b s n d']:
    """What the streams carry on, plus to each its share of a branch's output."""
    if carried.shape[1] != 1 or not by_hand(carried, share, out):
        return write_formula(carried, share, out)
    written: Tensor = WriteStreams.apply(carried, share, out)  # type: ignore[no-untyped-call]
    return written


class WriteStreams(torch.autograd.Function):
    """For streams that all carry on the same."""

    generate_vmap_rule = True

    @staticmethod
    def forward(carried: Float[Tensor, 'b #s n d'], share: Float[Tensor, 'b s n'], out: Float[Tensor, 'b n d']) -> Tensor:
        return torch.addcmul(carried, share.unsqueeze(-1), out.unsqueeze(1))

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Float[Tensor, 'b #s n d'], Float[Tensor, 'b s n'], Float[Tensor, 'b n d']],
        output: Float[Tensor, 'b s n d'],
    ) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, 'b s n d']) -> tuple[Tensor | None, ...]:
        share, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: let autograd see plain operations
            return grad.sum(1, keepdim=True), (grad * out.unsqueeze(1)).sum(-1), (grad * share.unsqueeze(-1)).sum(1)
        grad_out = grad[:, 0] * share[:, 0].unsqueeze(-1)
        for stream in range(1, share.shape[1]):
            grad_out = torch.addcmul(grad_out, grad[:, stream], share[:, stream].unsqueeze(-1))
        of_shares = [(part * out).sum(-1) for part in grad.unbind(1)]
        return grad.sum(1, keepdim=True), torch.stack(of_shares, dim=1), grad_out
