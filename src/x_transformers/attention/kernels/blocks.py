"""Attention in blocks of queries, in plain PyTorch: each block reads only keys it may attend to; no score matrix is saved.

The backward computes the scores of a block again (https://arxiv.org/abs/2112.05682). A block has whole rows of all heads, so
that rules on these fit as well.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.kernels import block_steps
from x_transformers.attention.kernels.base import CallFacts, KernelArgs, Needs, regrouped, usual_refusals
from x_transformers.attention.kernels.block_steps import BlockExtras, BlockShape, InBlocks, blocks_of
from x_transformers.attention.kernels.sdpa import unified
from x_transformers.attention.scores.similarity import as_products
from x_transformers.helpers import is_traced, without_autocast
from x_transformers.position.bias import rendered_bias
from x_transformers.tensor_types import Bool, Float, Shaped

WEIGHTS = ('softmax', 'sigmoid', 'sparse_topk')
MIXERS = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')


class Blocks:
    """A softmax over scores with bias, soft clamp, sink, mask and window; talking heads; sparse top-k; a sigmoid."""

    name = 'blocks'

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = usual_refusals(needs, call, weights=WEIGHTS, whole=MIXERS)
        if call.geometry.is_open:
            reasons.append('lengths are left open, and a loop over blocks needs them')
        if call.dropout:
            reasons.append('dropout would have to drop the same weights again in the backward')
        if call.masked_heads and any(rule in MIXERS for rule in needs.whole):
            reasons.append('heads are mixed that see different keys')
        return tuple(reasons)

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = []
        if call.return_scores:
            reasons.append('the next layer wants the scores, which would be computed a second time')
        if call.geometry.queries < block_steps.block_rows(call.key_dim):
            reasons.append('there is less than one block of queries')
        if is_traced():
            reasons.append('a trace cannot keep it')
        return tuple(reasons)

    def __call__(self, args: KernelArgs) -> Float[Tensor, 'b h i e']:
        q, k, v = unified(args)
        if args.l2_distance:
            # a softmax does not see what is the same in a whole row; all that stands in front of it, or in its place, does
            whole = (
                args.sink is not None or args.softclamp is not None or args.sigmoid or any(m is not None for m in args.mixers)
            )
            q, k = as_products(q, k, whole=whole)
        shape = block_shape(args)
        bias, shape = with_bias(args, shape)
        allowed, opened = masks(args, q)
        extra = BlockExtras(bias, args.sink, *args.mixers, allowed, opened)
        if args.sink is not None:
            # the sink is the score of one more key, which has no value
            k, v, extra, shape = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), behind_sink(extra, shape), more_front(shape)
        groups = q.shape[1] // k.shape[1]
        apart = groups > 1 and k.shape[1] > 1
        if apart:
            q, extra = regrouped(q, groups), heads_regrouped(extra, q.shape[1], groups)
        # a compiler wants no tensor twice
        k, v = k if k is not q else k.view_as(k), v if v is not q and v is not k else v.view_as(v)
        with without_autocast(q):
            out: Tensor = InBlocks.apply(shape, q, k, v, *extra)  # type: ignore[no-untyped-call]
        return regrouped(out, k.shape[1]) if apart else out


def block_shape(args: KernelArgs) -> BlockShape:
    mask, geometry = args.mask, args.geometry
    past, ahead = (None, None) if mask.prefix is not None else mask.limits(geometry)
    height = block_steps.block_rows(args.q.shape[-1])
    return BlockShape(
        geometry.queries,
        geometry.keys,
        geometry.front,
        ahead,
        past,
        args.scale,
        height,
        args.softclamp,
        args.sigmoid,
        args.topk,
    )


def masks(
    args: KernelArgs, q: Float[Tensor, 'b h i d']
) -> tuple[Bool[Tensor, '#b #h #i j'] | None, Bool[Tensor, '#b #h #i 1'] | None]:
    """(who may look at whom, causality and window aside; who may look at anybody)."""
    # a prefix and causality belong together, so with a prefix all is rendered
    apart = args.mask if args.mask.prefix is not None else args.mask.apart_from_distance()
    return apart.rendered(args.geometry, q.device), args.mask.open_rows(args.geometry, q.device)


def with_bias(args: KernelArgs, shape: BlockShape) -> tuple[Tensor | None, BlockShape]:
    """The bias, as a strip as high as one block if it depends on the distance alone."""
    if args.bias is None:
        return None, shape
    blocks = list(blocks_of(shape))
    low = min(block.left - shape.first - block.top for block in blocks)
    high = max(block.right - shape.first - block.top for block in blocks)
    strip = args.bias.strip(args.geometry, shape.rows, low, max(high, low))
    if strip is None:
        return rendered_bias(args.bias, args.geometry), shape
    return strip, shape._replace(low=low)


def more_front(shape: BlockShape) -> BlockShape:
    return shape._replace(keys=shape.keys + 1, front=shape.front + 1)


def behind_sink(extra: BlockExtras, shape: BlockShape) -> BlockExtras:
    """One column more in front of what is written out for all keys."""
    allowed, bias = extra.allowed, extra.bias
    if bias is not None and shape.low is None:
        bias = F.pad(bias, (1, 0))
    return extra._replace(bias=bias, allowed=None if allowed is None else F.pad(allowed, (1, 0), value=True))


def heads_regrouped(extra: BlockExtras, heads: int, groups: int) -> BlockExtras:
    """The same for heads in the other order."""

    def axis(t: Shaped[Tensor, '#b h ...'] | None) -> Tensor | None:
        return t if t is None or t.shape[1] != heads else regrouped(t, groups)

    def matrix(t: Float[Tensor, 'h h'] | None) -> Tensor | None:
        return None if t is None else t.view(groups, -1, groups, heads // groups).permute(1, 0, 3, 2).reshape(heads, heads)

    return BlockExtras(
        axis(extra.bias),
        None if extra.sink is None else extra.sink.view(groups, -1).t().flatten(),
        matrix(extra.before),
        matrix(extra.after),
        matrix(extra.around),
        axis(extra.allowed),
        axis(extra.opened),
    )
