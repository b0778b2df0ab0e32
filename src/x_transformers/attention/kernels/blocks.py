"""Attention in blocks of queries, in plain PyTorch: each block meets only keys it may see, and no score matrix is kept.

The backward computes the scores of a block again, from the log of its normaliser (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from x_transformers.attention.kernels.base import Call, Job, Needs, tiled
from x_transformers.attention.kernels.sdpa import unified
from x_transformers.attention.scores.base import rendered_bias
from x_transformers.attention.scores.similarity import as_products
from x_transformers.tensor_types import Bool, Float

ROWS = 128


class Blocks:
    """A softmax over scores with bias, soft clamp, sink, mask and window. A second derivative needs the reference."""

    name = 'blocks'

    def refusals(self, needs: Needs, call: Call) -> tuple[str, ...]:
        reasons = [f'{rule} needs whole rows or all heads of the score matrix' for rule in needs.whole]
        if needs.weights != 'softmax':
            reasons.append(f'{needs.weights} is not a softmax')
        if needs.onnxable:
            reasons.append('onnxable asks for plain operations')
        if call.previous:
            reasons.append('the scores of the layer before are added')
        if call.dropout:
            reasons.append('dropout would have to forget the same weights again in the backward')
        return tuple(reasons)

    def reservations(self, needs: Needs, call: Call) -> tuple[str, ...]:
        reasons = []
        if call.hand_on:
            reasons.append('the next layer wants the scores, which would be computed a second time')
        if call.where.queries < ROWS:
            reasons.append('there is less than one block of queries')
        return tuple(reasons)

    def __call__(self, job: Job) -> Float[Tensor, 'b h i e']:
        q, k, v = unified(job.q, job.k, job.v)
        if job.l2_distance:
            q, k = as_products(q, k, whole=job.sink is not None or job.softclamp is not None)
        mask, where = job.mask, job.where
        # a prefix and causality belong together, so with a prefix all is rendered
        apart = mask if mask.prefix is not None else mask.apart_from_distance()
        allowed = apart.rendered(where, q.device)
        causal = mask.limits_future(where) and mask.prefix is None
        past = mask.past if mask.limits_past(where) and mask.prefix is None else None
        shape = Shape(where.queries, where.keys, where.front, causal, past, job.softclamp)
        bias, shape = with_bias(job, shape)
        out: Tensor = InBlocks.apply(q * job.scale, k, v, bias, job.sink, allowed, shape)  # type: ignore[no-untyped-call]
        return out


class Shape(NamedTuple):
    """What is fixed before any number is known."""

    queries: int
    keys: int
    front: int
    causal: bool
    past: int | None
    softclamp: float | None
    # where the bias is a strip, good for all blocks: the first of its columns, counted from the first query of a block
    low: int | None = None

    @property
    def first(self) -> int:
        """Index among the own keys of the first query."""
        return self.keys - self.front - self.queries


def with_bias(job: Job, shape: Shape) -> tuple[Tensor | None, Shape]:
    """The bias, as a strip as high as one block if it depends on the distance alone."""
    if job.bias is None:
        return None, shape
    blocks = list(blocks_of(shape))
    low = min(block.left - shape.first - block.top for block in blocks)
    high = max(block.right - shape.first - block.top for block in blocks)
    strip = job.bias.strip(job.where, min(ROWS, shape.queries), low, max(high, low))
    if strip is None:
        return rendered_bias(job.bias, job.where), shape
    return strip, shape._replace(low=low)


class Block(NamedTuple):
    """Rows [top, bottom) and own columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


def blocks_of(shape: Shape) -> Iterator[Block]:
    own, first = shape.keys - shape.front, shape.first
    for top in range(0, shape.queries, ROWS):
        bottom = min(top + ROWS, shape.queries)
        right = min(max(first + bottom, 0), own) if shape.causal else own
        left = 0 if shape.past is None else min(max(first + top - shape.past, 0), right)
        yield Block(top, bottom, left, right)


def columns(t: Tensor, block: Block, shape: Shape, dim: int) -> Tensor:
    """The front and the block's own columns, along one axis."""
    front = shape.front
    own = t.narrow(dim, front + block.left, block.right - block.left)
    return own if front == 0 else torch.cat((t.narrow(dim, 0, front), own), dim=dim)


def add_columns(total: Tensor, part: Tensor, block: Block, shape: Shape, dim: int) -> None:
    """The reverse: add a part to the columns that it is about."""
    front, width = shape.front, block.right - block.left
    total.narrow(dim, front + block.left, width).add_(part.narrow(dim, front, width))
    if front:
        total.narrow(dim, 0, front).add_(part.narrow(dim, 0, front))


def rows(t: Tensor, block: Block) -> Tensor:
    """The block's rows; an axis of 1 is all of them."""
    return t if t.shape[-2] == 1 else t[..., block.top : block.bottom, :]


def bias_of(bias: Tensor, block: Block, shape: Shape) -> tuple[Tensor, int]:
    """(the block's part of a bias, or of its gradient; which of the block's columns it begins at)."""
    if shape.low is None:
        return rows(bias, block), 0
    begin = block.left - shape.first - block.top - shape.low
    return bias[..., : block.bottom - block.top, begin : begin + block.right - block.left], shape.front


def forbid(scores: Tensor, allowed: Bool[Tensor, '#b #h #i j'] | None, block: Block, shape: Shape) -> None:
    """-inf where nobody may look. Causality and the window are asked only of the columns where they matter."""
    hidden = float('-inf')
    if allowed is not None:
        scores.masked_fill_(~columns(rows(allowed, block), block, shape, -1), hidden)
    top, bottom = shape.first + block.top, shape.first + block.bottom
    query = torch.arange(top, bottom, device=scores.device).unsqueeze(-1)
    begin = min(max(top + 1, block.left), block.right)
    if shape.causal and begin < block.right:
        later = torch.arange(begin, block.right, device=scores.device) > query
        scores[..., shape.front + begin - block.left :].masked_fill_(later, hidden)
    if shape.past is None:
        return
    end = min(bottom - 1 - shape.past, block.right)
    if end > block.left:
        gone = torch.arange(block.left, end, device=scores.device) < query - shape.past
        scores.narrow(-1, shape.front, end - block.left).masked_fill_(gone, hidden)


def scores_of(
    q: Tensor, k: Tensor, bias: Tensor | None, allowed: Tensor | None, block: Block, shape: Shape, *, bent: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(scores of a block, -inf where forbidden; the soft clamp's slope, if ``bent``)."""
    scores = q @ k.transpose(-1, -2)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if bias is not None:
        part, begin = bias_of(bias, block, shape)
        if shape.low is None:
            part = columns(part, block, shape, -1)
        scores[..., begin:].add_(part)
    slope = None
    if shape.softclamp is not None:
        scores.div_(shape.softclamp).tanh_()
        slope = 1 - scores.square() if bent else None
        scores.mul_(shape.softclamp)
    forbid(scores, allowed, block, shape)
    return scores, slope


def weights_of(logs: Tensor, bias: Tensor | None) -> Tensor:
    """The exponential, in place. A bias makes many weights so small that processors take a hundred times as long over them,
    and that no sum in this precision can tell them from 0, which they become.
    """
    if bias is not None:
        torch.threshold_(logs, 3 * log(torch.finfo(logs.dtype).eps), float('-inf'))
    return logs.exp_()


def summed_to(t: Tensor, like: Tensor) -> Tensor:
    """Sum over the axes along which ``like`` has broadcast (the last one aside)."""
    axes = [axis for axis in range(t.ndim - 1) if like.shape[axis] == 1 and t.shape[axis] != 1]
    return t.sum(axes, keepdim=True) if axes else t


def to_kv_heads(t: Float[Tensor, 'b h j d'], kv_heads: int) -> Float[Tensor, 'b kh j d']:
    return t if t.shape[1] == kv_heads else t.view(t.shape[0], -1, kv_heads, *t.shape[2:]).sum(1)


class InBlocks(torch.autograd.Function):
    """Queries come scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, 'b kh j d'],
        v: Float[Tensor, 'b kh j e'],
        bias: Float[Tensor, '#b #h #i j'] | None,
        sink: Float[Tensor, 'h'] | None,
        allowed: Bool[Tensor, '#b #h #i j'] | None,
        shape: Shape,
    ) -> Float[Tensor, 'b h i e']:
        heads = q.shape[1]
        wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = torch.empty(*q.shape[:-1], 1, dtype=wide, device=q.device)
        lowest, least = torch.finfo(wide).min, torch.finfo(wide).tiny
        for block in blocks_of(shape):
            kept_k, kept_v = (tiled(columns(t, block, shape, -2), heads) for t in (k, v))
            scores, _ = scores_of(q[..., block.top : block.bottom, :], kept_k, bias, allowed, block, shape)
            if scores.shape[-1]:
                top = scores.amax(-1, keepdim=True).clamp(min=lowest)
            else:
                top = torch.full_like(lse[..., block.top : block.bottom, :], lowest)
            if sink is not None:
                column = sink.to(wide).view(1, -1, 1, 1)
                top = torch.maximum(top, column)
            weights = weights_of(scores.sub_(top), bias)
            total = weights.sum(-1, keepdim=True)
            if sink is not None:
                total = total + (column - top).exp()
            total = total.clamp(min=least)
            found = weights.to(v.dtype) @ kept_v
            out[..., block.top : block.bottom, :] = (found / total).to(out.dtype)
            lse[..., block.top : block.bottom, :] = top + total.log()
        ctx.save_for_backward(q, k, v, bias, sink, allowed, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, bias, sink, allowed, out, lse = ctx.saved_tensors
        shape, heads = ctx.shape, q.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        # how much the output of a row changes with its normaliser
        delta = (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)
        for block in blocks_of(shape):
            at = (..., slice(block.top, block.bottom), slice(None))
            kept_k, kept_v = (tiled(columns(t, block, shape, -2), heads) for t in (k, v))
            scores, slope = scores_of(q[at], kept_k, bias, allowed, block, shape, bent=True)
            weights = weights_of(scores.sub_(lse[at]), bias)
            block_v = weights.to(v.dtype).transpose(-1, -2) @ grad[at]
            add_columns(grad_v, to_kv_heads(block_v, v.shape[1]), block, shape, -2)
            change = (grad[at] @ kept_v.transpose(-1, -2)).to(weights.dtype).sub_(delta[at]).mul_(weights)
            if slope is not None:
                change.mul_(slope)
            if grad_bias is not None:
                target, begin = bias_of(grad_bias, block, shape)
                part = summed_to(change[..., begin:], target).to(target.dtype)
                if shape.low is None:
                    add_columns(target, part, block, shape, -1)
                else:
                    target.add_(part)
            change = change.to(q.dtype)
            grad_q[at] = change @ kept_k
            add_columns(grad_k, to_kv_heads(change.transpose(-1, -2) @ q[at], k.shape[1]), block, shape, -2)
        grad_sink = None
        if sink is not None and ctx.needs_input_grad[4]:
            share = (sink.to(lse.dtype).view(1, -1, 1, 1) - lse).exp()
            grad_sink = -(share * delta).sum((0, 2, 3)).to(sink.dtype)
        return grad_q, grad_k, grad_v, grad_bias, grad_sink, None, None
