"""Attention in blocks of queries, in plain PyTorch: each block meets only keys it may see, and no score matrix is kept.

The backward computes the scores of a block again (https://arxiv.org/abs/2112.05682). A block has whole rows of all heads, so
that rules on these fit as well.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.kernels import block_steps
from x_transformers.attention.kernels.base import Call, Job, Needs, regrouped, usual_refusals
from x_transformers.attention.kernels.block_steps import Extra, InBlocks, Shape, blocks_of, without_autocast
from x_transformers.attention.kernels.sdpa import unified
from x_transformers.attention.scores.base import rendered_bias
from x_transformers.attention.scores.similarity import as_products
from x_transformers.tensor_types import Bool, Float

WEIGHTS = ('softmax', 'sigmoid', 'sparse_topk')
MIXERS = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')


class Blocks:
    """A softmax over scores with bias, soft clamp, sink, mask and window; heads that talk; the largest of each row; a sigmoid.

    A second derivative needs the reference.
    """

    name = 'blocks'

    def refusals(self, needs: Needs, call: Call) -> tuple[str, ...]:
        reasons = usual_refusals(needs, call, weights=WEIGHTS, whole=MIXERS)
        if call.dropout:
            reasons.append('dropout would have to forget the same weights again in the backward')
        if call.masked_heads and any(rule in MIXERS for rule in needs.whole):
            reasons.append('heads are mixed that see different keys')
        return tuple(reasons)

    def reservations(self, needs: Needs, call: Call) -> tuple[str, ...]:
        reasons = []
        if call.hand_on:
            reasons.append('the next layer wants the scores, which would be computed a second time')
        if call.where.queries < block_steps.ROWS:
            reasons.append('there is less than one block of queries')
        return tuple(reasons)

    def __call__(self, job: Job) -> Float[Tensor, 'b h i e']:
        q, k, v = unified(job.q, job.k, job.v)
        if job.l2_distance:
            # a softmax does not see what is the same in a whole row; all that stands in front of it, or in its place, does
            whole = job.sink is not None or job.softclamp is not None or job.sigmoid or any(m is not None for m in job.mixers)
            q, k = as_products(q, k, whole=whole)
        shape = shape_of(job)
        bias, shape = with_bias(job, shape)
        allowed, opened = masks(job, q)
        extra = Extra(bias, job.sink, *job.mixers, allowed, opened)
        if job.sink is not None:
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


def shape_of(job: Job) -> Shape:
    mask, where = job.mask, job.where
    causal = mask.limits_future(where) and mask.prefix is None
    past = mask.past if mask.limits_past(where) and mask.prefix is None else None
    return Shape(where.queries, where.keys, where.front, causal, past, job.scale, job.softclamp, job.sigmoid, job.topk)


def masks(job: Job, q: Tensor) -> tuple[Bool[Tensor, '#b #h #i j'] | None, Bool[Tensor, '#b #h #i 1'] | None]:
    """(who may look at whom, causality and window aside; who may look at anybody)."""
    # a prefix and causality belong together, so with a prefix all is rendered
    apart = job.mask if job.mask.prefix is not None else job.mask.apart_from_distance()
    return apart.rendered(job.where, q.device), job.mask.open_rows(job.where, q.device)


def with_bias(job: Job, shape: Shape) -> tuple[Tensor | None, Shape]:
    """The bias, as a strip as high as one block if it depends on the distance alone."""
    if job.bias is None:
        return None, shape
    blocks = list(blocks_of(shape))
    low = min(block.left - shape.first - block.top for block in blocks)
    high = max(block.right - shape.first - block.top for block in blocks)
    strip = job.bias.strip(job.where, shape.rows, low, max(high, low))
    if strip is None:
        return rendered_bias(job.bias, job.where), shape
    return strip, shape._replace(low=low)


def more_front(shape: Shape) -> Shape:
    return shape._replace(keys=shape.keys + 1, front=shape.front + 1)


def behind_sink(extra: Extra, shape: Shape) -> Extra:
    """One column more in front of what is written out for all keys."""
    allowed, bias = extra.allowed, extra.bias
    if bias is not None and shape.low is None:
        bias = F.pad(bias, (1, 0))
    return extra._replace(bias=bias, allowed=None if allowed is None else F.pad(allowed, (1, 0), value=True))


def heads_regrouped(extra: Extra, heads: int, groups: int) -> Extra:
    """The same for heads in the other order."""

    def axis(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[1] != heads else regrouped(t, groups)

    def matrix(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view(groups, -1, groups, heads // groups).permute(1, 0, 3, 2).reshape(heads, heads)

    return Extra(
        axis(extra.bias),
        None if extra.sink is None else extra.sink.view(groups, -1).t().flatten(),
        matrix(extra.before),
        matrix(extra.after),
        matrix(extra.around),
        axis(extra.allowed),
        axis(extra.opened),
    )
