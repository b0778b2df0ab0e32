"""Normalization from scores to weights, and the weighted sum of the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.helpers import max_neg_value, minus_rounding, single, topk_threshold
from x_transformers.tensor_types import Bool, Float

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

    Scores that differ from the least of them by rounding only are ties too. Otherwise the order of a sum would choose keys.

    ``straight_through`` gives it the gradient of softmax(logits / temperature) over everything,
    https://arxiv.org/abs/2505.22074
    """
    lowest = max_neg_value(logits)
    if isinstance(logits.shape[-1], int):
        least = topk_threshold(logits, min(sparse_topk, logits.shape[-1]))
    else:
        # an exporter that leaves the length open cannot tell that the smaller of two lengths fits
        least = minus_rounding(logits.sort(dim=-1, descending=True).values[..., :sparse_topk].amin(dim=-1, keepdim=True))
    sparse = logits.masked_fill((logits < least) | (logits <= lowest), lowest).softmax(dim=-1)
    if not straight_through:
        return sparse
    soft = (logits / temperature).softmax(dim=-1)
    return sparse.detach() + (soft - soft.detach())


def closed_scores(scores: Float[Tensor, '... j']) -> Bool[Tensor, '... j']:
    """Which scores are those of keys that may not be seen: about the lowest number there is."""
    return scores <= max_neg_value(scores) / 2


def softpick(scores: Float[Tensor, '... j'], eps: float = 1e-6) -> Float[Tensor, '... j']:
    """relu(exp(x) - 1) / (the sum of |exp(x) - 1| over keys that may be seen, + eps), https://arxiv.org/abs/2504.20966.

    Both are multiplied by exp(-m), where m is the largest score, or 0 if it is negative: nothing overflows.
    """
    closed, wide = closed_scores(scores), single(scores)
    largest = F.pad(wide.detach().masked_fill(closed, 0.0), (0, 1)).amax(dim=-1, keepdim=True)
    one = (-largest).exp()
    moved = ((wide - largest).exp() - one).masked_fill(closed, 0.0)
    return moved.relu() / (moved.abs().sum(dim=-1, keepdim=True) + eps * one)


def stick_breaking(scores: Float[Tensor, '... j']) -> Float[Tensor, '... j']:
    """From the last key to the first each takes the part sigmoid(score) of what the later ones have left.

    Keys that may not be seen take nothing. Computed in logarithms: sums of log(1 - part). https://arxiv.org/abs/2410.17980
    """
    closed, wide = closed_scores(scores), single(scores)
    kept = F.logsigmoid(-wide).masked_fill(closed, 0.0)
    left = F.pad(kept[..., 1:], (0, 1)).flip(-1).cumsum(dim=-1).flip(-1)
    return (F.logsigmoid(wide) + left).exp().masked_fill(closed, 0.0)


class Normalize(ScoreRule):
    """Scores become weights, in the scores' precision. One of its kinds is on, ``Softmax`` where no other is."""

    form = Form.WEIGHTS

    def __init__(self, function: WeightFunction) -> None:
        self.function = function

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        return cls(cls.weights(flags)) if cls.is_on(flags) else None

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        raise NotImplementedError

    def apply(self, state: ScoreState) -> None:
        state.scores = self.function(state.scores).to(state.scores.dtype)


class Softmax(Normalize):
    name = 'softmax'
    unfused = None

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return not any(kind.is_on(flags) for kind in NORMALIZERS if kind is not cls)

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        # with normed queries and keys scores are small
        return partial(softmax, wide=not flags.qk_norm)


class CustomWeights(Normalize):
    name = 'custom_attn_fn'
    unfused = 'a function of your own needs all scores'

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        if flags.custom_attn_fn is None:
            raise ValueError('custom_attn_fn must be a function of scores, got None. Give one, or leave its flag out.')
        return flags.custom_attn_fn


class Sigmoid(Normalize):
    name = 'sigmoid'
    unfused = None

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        return torch.sigmoid


class Hard(Normalize):
    name = 'hard'
    unfused = 'one key is chosen by the scores of all'

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        return one_hot_straight_through


class TopK(Normalize):
    """A softmax over the highest scores of each query."""

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return flags.sparse_topk is not None and flags.sparse_topk_straight_through == (cls is StraightThroughTopK)

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        straight = flags.sparse_topk_straight_through
        return partial(sparse_topk_attn, sparse_topk=flags.sparse_topk or 1, straight_through=straight)


class SparseTopK(TopK):
    name = 'sparse_topk'
    unfused = None


class StraightThroughTopK(TopK):
    name = 'sparse_topk_straight_through'
    unfused = 'the gradient is that of all scores'


class Softpick(Normalize):
    name = 'softpick'
    unfused = 'scores below 0 count in its sum, but get no weight'

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        return softpick


class StickBreaking(Normalize):
    name = 'stick_breaking'
    unfused = 'what is left for a key depends on all scores between it and the query'

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        return stick_breaking


class Gumbel(Normalize):
    name = 'gumbel_softmax'
    unfused = 'the noise belongs to every single score'

    @classmethod
    def weights(cls, flags: ScoreFlags) -> WeightFunction:
        return partial(F.gumbel_softmax, tau=flags.gumbel_softmax_temp, hard=flags.gumbel_softmax_hard, dim=-1)


# the ways from scores to weights, of which one is on
NORMALIZERS: tuple[type[Normalize], ...] = (
    CustomWeights, Sigmoid, Hard, SparseTopK, StraightThroughTopK, Softpick, StickBreaking, Gumbel, Softmax,
)  # fmt: skip


class AttentionDropout(ScoreRule):
    """While training, leave some weights out."""

    name = 'dropout'
    form = Form.DROPOUT
    unfused = None

    def __init__(self, probability: float) -> None:
        self.probability = probability

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return flags.dropout > 0

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        return cls(flags.dropout) if flags.dropout > 0 and parts.training else None

    def apply(self, state: ScoreState) -> None:
        state.scores = F.dropout(state.scores, self.probability)


class WeightedSum(ScoreRule):
    """The output: values, each as much as its weight."""

    name = 'values'
    form = Form.OUTPUT
    unfused = None

    def apply(self, state: ScoreState) -> None:
        v = tiled_heads(state.v, state.q.shape[1])
        state.out = state.scores.to(v.dtype) @ v


class ZeroMaskedRows(ScoreRule):
    """A query with nothing to look at gives 0."""

    name = 'empty rows'
    form = Form.MASK
    unfused = None

    def apply(self, state: ScoreState) -> None:
        open_rows = state.mask.open_rows(state.geometry, state.q.device)
        if open_rows is not None:
            state.out = state.out.masked_fill(~open_rows, 0.0)


def log_prob_from_hard_attend(intermeds: Intermediates) -> Float[Tensor, 'b h i']:
    """Log probability, under the softmax of its scores, of the key that hard attention has chosen for each query."""
    scores, weights = intermeds.pre_softmax_attn, intermeds.post_softmax_attn
    if scores is None or weights is None:
        raise ValueError('intermeds must hold attention maps. Run attention with return_intermediates=True.')
    return scores.log_softmax(dim=-1).gather(-1, weights.argmax(dim=-1, keepdim=True)).squeeze(-1)
