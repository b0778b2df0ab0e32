"""Forward and backward arithmetic of one block of queries, for attention in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.helpers import by_formula, single, softclamp, topk_threshold, without_autocast
from x_transformers.tensor_types import Bool, Float, Shaped


def block_rows(key_dim: int) -> int:
    """Queries in a block: so many that its scores take no more memory than its keys."""
    return key_dim


class BlockShape(NamedTuple):
    """What is fixed before any number is known."""

    queries: int
    keys: int
    front: int
    # how far a query sees ahead (0: causality) and back
    ahead: int | None
    past: int | None
    scale: float
    # queries in a block
    height: int
    softclamp: float | None = None
    sigmoid: bool = False
    topk: int | None = None
    # where the bias is a strip, good for all blocks: the first of its columns, counted from the first query of a block
    low: int | None = None

    @property
    def own(self) -> int:
        return self.keys - self.front

    @property
    def first(self) -> int:
        """Index among the own keys of the first query."""
        return self.keys - self.front - self.queries

    @property
    def rows(self) -> int:
        """Queries in a block."""
        return min(self.height, self.queries)


class BlockExtras(NamedTuple):
    """What else plays a part beside queries, keys and values. Heads lie as in the queries; any of it may be missing.

    ``before`` mixes scores, ``after`` weights, ``around`` the scores that weights are multiplied by in the end.
    ``opened`` tells queries that have something to look at, ``sink`` is the score of the first column.
    """

    bias: Float[Tensor, '#b #h #i j'] | None = None
    sink: Float[Tensor, 'h'] | None = None
    before: Float[Tensor, 'h h'] | None = None
    after: Float[Tensor, 'h h'] | None = None
    around: Float[Tensor, 'h h'] | None = None
    allowed: Bool[Tensor, '#b #h #i j'] | None = None
    opened: Bool[Tensor, '#b #h #i 1'] | None = None


class Block(NamedTuple):
    """Rows [top, bottom) and own columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


def blocks_of(shape: BlockShape) -> Iterator[Block]:
    own, first = shape.own, shape.first
    for top in range(0, shape.queries, max(shape.rows, 1)):
        bottom = min(top + shape.rows, shape.queries)
        right = own if shape.ahead is None else min(max(first + bottom + shape.ahead, 0), own)
        left = 0 if shape.past is None else min(max(first + top - shape.past, 0), right)
        yield Block(top, bottom, left, right)


# ---------------------------------------------------------------- which part of a tensor a block is about


def columns(t: Shaped[Tensor, '...'], block: Block, shape: BlockShape, dim: int) -> Tensor:
    """The front and the block's own columns, along one axis."""
    front = shape.front
    if block.left == 0 or front == 0:
        begin = block.left if front == 0 else 0
        return t.narrow(dim, begin, front + block.right - begin)
    return torch.cat((t.narrow(dim, 0, front), t.narrow(dim, front + block.left, block.right - block.left)), dim=dim)


def add_columns(total: Float[Tensor, '...'], part: Float[Tensor, '...'], block: Block, shape: BlockShape, dim: int) -> None:
    """The reverse: add a part to the columns that it is about."""
    front, width = shape.front, block.right - block.left
    total.narrow(dim, front + block.left, width).add_(part.narrow(dim, front, width))
    if front:
        total.narrow(dim, 0, front).add_(part.narrow(dim, 0, front))


def rows(t: Shaped[Tensor, '... i j'], block: Block) -> Tensor:
    """The block's rows; an axis of 1 is all of them."""
    return t if t.shape[-2] == 1 else t[..., block.top : block.bottom, :]


def bias_of_block(bias: Float[Tensor, '#b #h i j'], block: Block, shape: BlockShape) -> tuple[Tensor, int]:
    """(the block's part of a bias, or of its gradient; which of the block's columns it begins at)."""
    if shape.low is None:
        return rows(bias, block), 0
    begin = block.left - shape.first - block.top - shape.low
    return bias[..., : block.bottom - block.top, begin : begin + block.right - block.left], shape.front


def summed_to(t: Float[Tensor, '... i j'], like: Float[Tensor, '...']) -> Tensor:
    """Sum over the axes along which ``like`` has broadcast (the last one aside)."""
    axes = [axis for axis in range(t.ndim - 1) if like.shape[axis] == 1 and t.shape[axis] != 1]
    return t.sum(axes, keepdim=True) if axes else t


# ---------------------------------------------------------------- products and functions of a block


class Scratch:
    """Memory that one block after the other writes its numbers on. A compiler finds its own."""

    def __init__(self, like: Shaped[Tensor, '...'], heads: int, shape: BlockShape) -> None:
        size = heads * shape.rows * shape.keys
        self.memory = None if torch.compiler.is_compiling() else like.new_empty(size)

    def product(self, a: Float[Tensor, 'n x y'], b: Float[Tensor, 'n y z']) -> Float[Tensor, 'n x z']:
        if self.memory is None:
            return torch.bmm(a, b)
        size = (a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=self.memory[: size[0] * size[1] * size[2]].view(size))


def mixed(weight: Float[Tensor, 'g h'], t: Float[Tensor, 'b h i j']) -> Float[Tensor, 'b g i j']:
    return torch.bmm(weight.to(t.dtype).expand(t.shape[0], -1, -1), t.flatten(2)).view_as(t)


def mixed_gradient(grad: Float[Tensor, 'b g i j'], t: Float[Tensor, 'b h i j']) -> Float[Tensor, 'g h']:
    return torch.bmm(grad.flatten(2), t.flatten(2).transpose(1, 2)).sum(0)


def softmax_(scores: Float[Tensor, 'b h i j']) -> Tensor:
    if torch.compiler.is_compiling() or scores.device.type != 'cpu':
        return scores.softmax(dim=-1)
    return torch.softmax(scores, dim=-1, out=scores)


def softmax_backward_(grad: Float[Tensor, 'b h i j'], weights: Float[Tensor, 'b h i j']) -> Tensor:
    out: Tensor
    if torch.compiler.is_compiling() or grad.device.type != 'cpu':
        out = torch._softmax_backward_data(grad, weights, -1, grad.dtype)
    else:
        # on a CPU each row is summed before it is written
        out = torch._softmax_backward_data(grad, weights, -1, grad.dtype, grad_input=grad)
    return out


def mask_scores_(
    scores: Float[Tensor, 'b h i j'], allowed: Bool[Tensor, '#b #h #q k'] | None, block: Block, shape: BlockShape
) -> None:
    """-inf where nobody may look. Causality and windows are asked only of the columns where they matter.

    It is added: to fill places of a mask takes many times as long.
    """
    mask_value = float('-inf')
    if allowed is not None:
        part = columns(rows(allowed, block), block, shape, -1)
        scores.add_(scores.new_zeros(part.shape).masked_fill_(~part, mask_value))
    top, bottom = shape.first + block.top, shape.first + block.bottom
    if shape.ahead is not None and (begin := min(max(top + shape.ahead + 1, block.left), block.right)) < block.right:
        later = scores.new_full((bottom - top, block.right - begin), mask_value).triu(top + shape.ahead - begin + 1)
        scores[..., shape.front + begin - block.left :].add_(later)
    if shape.past is None:
        return
    end = min(bottom - 1 - shape.past, block.right)
    if end > block.left:
        gone = scores.new_full((bottom - top, end - block.left), mask_value).tril(top - shape.past - block.left - 1)
        scores.narrow(-1, shape.front, end - block.left).add_(gone)


class BlockWeights(NamedTuple):
    """Of a block: the scores before they were mixed, the soft clamp's slope, the weights, and what these are multiplied by."""

    raw: Tensor | None
    slope: Tensor | None
    weights: Tensor
    factor: Tensor | None


def weigh(
    scores: Float[Tensor, 'b h i j'], extra: BlockExtras, block: Block, shape: BlockShape, *, backward: bool
) -> BlockWeights:
    """From products to weights, in place where that hurts nobody. ``backward``: this is for the backward pass."""
    raw = slope = factor = None
    if extra.around is not None:
        raw, factor = scores, mixed(extra.around, scores)
    if extra.before is not None:
        raw, scores = scores, mixed(extra.before, scores)
    elif raw is not None:
        scores = scores.clone()
    if extra.bias is not None:
        part, begin = bias_of_block(extra.bias, block, shape)
        scores[..., begin:].add_(columns(part, block, shape, -1) if shape.low is None else part)
    if shape.softclamp is not None:
        scores.div_(shape.softclamp).tanh_()
        slope = 1 - scores.square() if backward else None
        scores.mul_(shape.softclamp)
    mask_scores_(scores, extra.allowed, block, shape)
    if extra.sink is not None:
        scores[..., 0] = extra.sink.to(scores.dtype).unsqueeze(-1)
    if shape.topk is not None and shape.topk < scores.shape[-1]:
        scores.masked_fill_(scores < topk_threshold(scores, shape.topk), float('-inf'))
    weights = scores.sigmoid_() if shape.sigmoid else softmax_(scores)
    if extra.bias is not None:
        # a bias makes many weights so small that processors take a hundred times as long over them, and that no sum in this
        # precision can tell them from 0, which they become
        torch.threshold_(weights, torch.finfo(weights.dtype).eps ** 3, 0.0)
    if extra.opened is not None:
        weights.masked_fill_(~rows(extra.opened, block), 0.0)
    return BlockWeights(raw, slope, weights, factor)


def value_weights(of_block: BlockWeights, extra: BlockExtras) -> Float[Tensor, 'b h i j']:
    """The weights that values are looked up with."""
    weights = of_block.weights if extra.after is None else mixed(extra.after, of_block.weights)
    return weights if of_block.factor is None else weights * of_block.factor


class Gradients:
    """What has been found of the gradients of ``Extra``, added up over blocks; None where none is wanted."""

    def __init__(self, extra: BlockExtras, wanted: tuple[bool, ...]) -> None:
        zeros = [torch.zeros_like(t) if t is not None and want else None for t, want in zip(extra, wanted, strict=True)]
        self.bias, self.sink, self.before, self.after, self.around = zeros[:5]

    def through(
        self, grad: Float[Tensor, 'b h i j'], of_block: BlockWeights, extra: BlockExtras, block: Block, shape: BlockShape
    ) -> Float[Tensor, 'b h i j']:
        """From the gradient of ``value_weights`` to that of the products."""
        of_factor = None
        if of_block.factor is not None:
            weights = of_block.weights if extra.after is None else mixed(extra.after, of_block.weights)
            of_factor, grad = grad * weights, grad * of_block.factor
        if extra.after is not None:
            if self.after is not None:
                self.after += mixed_gradient(grad, of_block.weights)
            grad = mixed(extra.after.t(), grad)
        if shape.sigmoid:
            grad = torch.ops.aten.sigmoid_backward(grad, of_block.weights)
        else:
            grad = softmax_backward_(grad, of_block.weights)
        if extra.sink is not None:
            if self.sink is not None:
                self.sink += grad[..., 0].sum((0, 2)).to(self.sink.dtype)
            grad[..., 0] = 0.0
        if of_block.slope is not None:
            grad.mul_(of_block.slope)
        if self.bias is not None:
            self.add_bias(grad, block, shape)
        if extra.before is not None and of_block.raw is not None:
            if self.before is not None:
                self.before += mixed_gradient(grad, of_block.raw)
            grad = mixed(extra.before.t(), grad)
        if extra.around is not None and of_factor is not None and of_block.raw is not None:
            if self.around is not None:
                self.around += mixed_gradient(of_factor, of_block.raw)
            grad = grad + mixed(extra.around.t(), of_factor)
        return grad

    def add_bias(self, grad: Float[Tensor, 'b h i j'], block: Block, shape: BlockShape) -> None:
        if self.bias is None:
            return
        target, begin = bias_of_block(self.bias, block, shape)
        part = summed_to(grad[..., begin:], target).to(target.dtype)
        if shape.low is None:
            add_columns(target, part, block, shape, -1)
        else:
            target.add_(part)


def laid_out(t: Float[Tensor, 'b k j d']) -> Float[Tensor, '(b k) j d']:
    return t.flatten(0, 1).contiguous()


def stacked(t: Float[Tensor, 'b h i d'], block: Block, kv_heads: int) -> Float[Tensor, '(b k) (g i) d']:
    """A block's rows, those of all heads that share a key head one below the other."""
    rows = t[:, :, block.top : block.bottom]
    return rows.reshape(t.shape[0] * kv_heads, rows.shape[1] * rows.shape[2] // kv_heads, t.shape[-1])


class InBlocks(torch.autograd.Function):
    """Heads that share keys lie next to each other in the queries: head h looks at key head h // group."""

    @staticmethod
    def forward(
        ctx: Any,
        shape: BlockShape,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, 'b kh j d'],
        v: Float[Tensor, 'b kh j e'],
        *extra: Shaped[Tensor, '...'] | None,
    ) -> Float[Tensor, 'b h i e']:
        more, (batch, heads, queries, _), kv_heads = BlockExtras(*extra), q.shape, k.shape[1]
        ctx.save_for_backward(q, k, v, *extra)
        ctx.shape = shape
        # the heads of a token lie next to each other, as the projection behind wants them
        out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        keys, values, scratch = laid_out(k).transpose(1, 2), laid_out(v), Scratch(k, batch * heads, shape)
        queried = (q * shape.scale).contiguous()
        for block in blocks_of(shape):
            size = (batch, heads, block.bottom - block.top)
            scores = scratch.product(stacked(queried, block, kv_heads), columns(keys, block, shape, 2))
            of_block = weigh(single(scores).view(*size, scores.shape[-1]), more, block, shape, backward=False)
            weights = value_weights(of_block, more).to(v.dtype).view(scores.shape)
            out[:, :, block.top : block.bottom] = torch.bmm(weights, columns(values, block, shape, 1)).view(*size, v.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, 'b h i e']) -> tuple[Tensor | None, ...]:
        with without_autocast(grads[0]):
            if not torch.is_grad_enabled():
                return blocks_backward(ctx, grads[0])
            # a gradient of this gradient is wanted: let autograd see plain operations
            return None, *by_formula(partial(attention_formula, ctx.shape), ctx.saved_tensors, grads)


def attention_formula(
    shape: BlockShape,
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    v: Float[Tensor, 'b kh j e'],
    *extras: Shaped[Tensor, '...'] | None,
) -> Float[Tensor, 'b h i e']:
    """``InBlocks.forward`` on the whole score matrix, in operations that autograd can differentiate twice."""
    extra, group = BlockExtras(*extras), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    raw = scores = single((q * shape.scale) @ k.transpose(-1, -2))
    if extra.before is not None:
        scores = mixed(extra.before, raw)
    if extra.bias is not None:
        scores = scores + (extra.bias if shape.low is None else whole_bias(extra.bias, shape))
    if shape.softclamp is not None:
        scores = softclamp(scores, shape.softclamp)
    block = Block(0, shape.queries, 0, shape.own)
    closed = torch.zeros_like(scores)
    mask_scores_(closed, extra.allowed, block, shape)
    scores = scores + closed
    if extra.sink is not None:
        scores = torch.cat((extra.sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1), scores[..., 1:]), -1)
    if shape.topk is not None and shape.topk < scores.shape[-1]:
        scores = scores.masked_fill(scores < topk_threshold(scores, shape.topk), float('-inf'))
    weights = scores.sigmoid() if shape.sigmoid else safe_softmax(scores)
    if extra.opened is not None:
        weights = weights.masked_fill(~extra.opened, 0.0)
    if extra.after is not None:
        weights = mixed(extra.after, weights)
    if extra.around is not None:
        weights = weights * mixed(extra.around, raw)
    return weights.to(v.dtype) @ v


def safe_softmax(scores: Float[Tensor, '... j']) -> Float[Tensor, '... j']:
    """0 in a row in which all scores are -inf, where a softmax and its gradient are NaN."""
    empty = (scores == float('-inf')).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def whole_bias(strip: Float[Tensor, '1 h r m'], shape: BlockShape) -> Float[Tensor, '1 h i j']:
    """A strip that is good for each block, written out. What no block looks at is 0."""
    rows = []
    for block in blocks_of(shape):
        part, front = bias_of_block(strip, block, shape)
        rows.append(F.pad(part, (front + block.left, shape.own - block.right)))
    return torch.cat(rows, dim=-2)


def blocks_backward(ctx: Any, grad: Float[Tensor, 'b h i e']) -> tuple[Tensor | None, ...]:
    """The gradients of what ``InBlocks.forward`` was given."""
    q, k, v, *extra = ctx.saved_tensors
    shape, more, (batch, heads, _, width), kv_heads = ctx.shape, BlockExtras(*extra), q.shape, k.shape[1]
    gradients = Gradients(more, ctx.needs_input_grad[4:])
    keys, values = laid_out(k), laid_out(v)
    queried, grad = (q * shape.scale).contiguous(), grad.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(queried), torch.zeros_like(keys), torch.zeros_like(values)
    scratches = Scratch(keys, batch * heads, shape), Scratch(keys, batch * heads, shape)
    for block in blocks_of(shape):
        size = (batch, heads, block.bottom - block.top)
        rows_q, rows_grad = stacked(queried, block, kv_heads), stacked(grad, block, kv_heads)
        kept_k, kept_v = columns(keys, block, shape, 1), columns(values, block, shape, 1)
        scores = scratches[0].product(rows_q, kept_k.transpose(1, 2))
        of_block = weigh(single(scores).view(*size, scores.shape[-1]), more, block, shape, backward=True)
        weights = value_weights(of_block, more).to(v.dtype).view(scores.shape)
        add_columns(grad_v, torch.bmm(weights.transpose(1, 2), rows_grad), block, shape, 1)
        change = single(scratches[1].product(rows_grad, kept_v.transpose(1, 2))).view_as(of_block.weights)
        change = gradients.through(change, of_block, more, block, shape).to(q.dtype).view(scores.shape)
        grad_q[:, :, block.top : block.bottom] = torch.bmm(change, kept_k).view(*size, width)
        add_columns(grad_k, torch.bmm(change.transpose(1, 2), rows_q), block, shape, 1)
    of_extra = (gradients.bias, gradients.sink, gradients.before, gradients.after, gradients.around, None, None)
    return None, grad_q.mul_(shape.scale), grad_k.view(k.shape), grad_v.view(v.shape), *of_extra
