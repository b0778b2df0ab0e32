"""From scores to weights, and from weights to the output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.helpers import max_neg_value
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import Intermediates

WeightFunction = Callable[[Tensor], Tensor]


def softmax(scores: Float[Tensor, '... j'], *, wide: bool = True) -> Float[Tensor, '... j']:
    """In single precision or better if ``wide``, else in the scores' own."""
    dtype = torch.float32 if wide and scores.dtype in (torch.float16, torch.bfloat16) else None
    return scores.softmax(dim=-1, dtype=dtype)


def one_hot_straight_through(logits: Float[Tensor, '... j'], temperature: float = 1.0) -> Float[Tensor, '... j']:
    """1 at the largest, else 0, with the gradient of softmax(logits / temperature)."""
    one_hot = torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    soft = (logits / temperature).softmax(dim=-1)
    return one_hot + (soft - soft.detach())


def sparse_topk_attn(
    logits: Float[Tensor, '... j'], sparse_topk: int, temperature: float = 1.0, straight_through: bool = False
) -> Float[Tensor, '... j']:
    """Softmax of the ``sparse_topk`` largest of each row (all of them if there are fewer; ties are all kept), 0 elsewhere.

    ``straight_through`` gives it the gradient of softmax(logits / temperature) over everything,
    https://arxiv.org/abs/2505.22074
    """
    lowest = max_neg_value(logits)
    least = logits.topk(min(sparse_topk, logits.shape[-1]), dim=-1).values[..., -1:]
    sparse = logits.masked_fill((logits < least) | (logits <= lowest), lowest).softmax(dim=-1)
    if not straight_through:
        return sparse
    soft = (logits / temperature).softmax(dim=-1)
    return sparse.detach() + (soft - soft.detach())


def choose_weights(
    *,
    qk_norm: bool = False,
    sigmoid: bool = False,
    hard: bool = False,
    sparse_topk: int | None = None,
    sparse_topk_straight_through: bool = False,
    gumbel_softmax: bool = False,
    gumbel_softmax_temp: float = 1.0,
    gumbel_softmax_hard: bool = True,
    custom_attn_fn: WeightFunction | None = None,
) -> tuple[str, WeightFunction]:
    """(its name, the function from scores to weights)."""
    if custom_attn_fn is not None:
        return 'custom_attn_fn', custom_attn_fn
    if sigmoid:
        return 'sigmoid', torch.sigmoid
    if hard:
        return 'hard', one_hot_straight_through
    if sparse_topk is not None:
        return 'sparse_topk', partial(sparse_topk_attn, sparse_topk=sparse_topk, straight_through=sparse_topk_straight_through)
    if gumbel_softmax:
        return 'gumbel_softmax', partial(F.gumbel_softmax, tau=gumbel_softmax_temp, hard=gumbel_softmax_hard, dim=-1)
    # with normed queries and keys scores are small
    return 'softmax', partial(softmax, wide=not qk_norm)


class Normalize(ScoreRule):
    """Scores become weights, in the scores' precision."""

    name = 'weights'
    form = Form.WEIGHTS

    def __init__(self, function: WeightFunction) -> None:
        self.function = function

    def apply(self, state: ScoreState) -> None:
        state.scores = self.function(state.scores).to(state.scores.dtype)


class Dropout(ScoreRule):
    """While training, forget some weights."""

    name = 'dropout'
    form = Form.WHOLE

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def apply(self, state: ScoreState) -> None:
        state.scores = F.dropout(state.scores, self.probability)


class WeightedSum(ScoreRule):
    """The output: values, each as much as its weight."""

    name = 'values'
    form = Form.WEIGHTS

    def apply(self, state: ScoreState) -> None:
        weights, heads, kv_heads = state.scores, state.q.shape[1], state.v.shape[1]
        v = state.v if kv_heads in (1, heads) else state.v.repeat(1, heads // kv_heads, 1, 1)
        state.out = weights.to(v.dtype) @ v


class ZeroMaskedRows(ScoreRule):
    """A query with nothing to look at gives 0."""

    name = 'empty rows'
    form = Form.MASK

    def apply(self, state: ScoreState) -> None:
        open_rows = state.mask.open_rows(state.geometry, state.q.device)
        if open_rows is not None:
            state.out = state.out.masked_fill(~open_rows, 0.0)


def log_prob_from_hard_attend(intermeds: Intermediates) -> Float[Tensor, 'b h i']:
    """Log probability, under the softmax of its scores, of the key that hard attention has chosen for each query."""
    scores, weights = intermeds.pre_softmax_attn, intermeds.post_softmax_attn
    if scores is None or weights is None:
        raise ValueError('these intermediates carry no attention maps: run attention with return_intermediates=True')
    return scores.log_softmax(dim=-1).gather(-1, weights.argmax(dim=-1, keepdim=True)).squeeze(-1)
