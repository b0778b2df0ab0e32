"""Score rules that add: biases, the mask, and the maps recorded of scores."""

from __future__ import annotations

from typing import ClassVar

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.helpers import max_neg_value, pad_at_dim


class AddPrevious(ScoreRule):
    """Residual attention: add the scores of the layer before, https://arxiv.org/abs/2012.11747."""

    name = 'residual_attn'
    form = Form.BIAS
    unfused = None

    def apply(self, state: ScoreState) -> None:
        if state.previous is not None:
            # a layer without another model's keys has fewer columns in front than one with them; own keys are right-aligned
            missing = state.scores.shape[-1] - state.previous.shape[-1]
            scores = state.scores + pad_at_dim(state.previous, (missing, 0))
            # what was forbidden there is the lowest number already: keep the sum a number
            state.scores = scores.clamp(min=max_neg_value(scores))


class AddBias(ScoreRule):
    """Add the positional or the user's bias."""

    name = 'attn_bias'
    form = Form.BIAS
    unfused = None

    def apply(self, state: ScoreState) -> None:
        if state.bias is not None:
            state.scores = state.scores + state.bias.render(state.geometry)


class ApplyMask(ScoreRule):
    """Masked scores become the lowest number there is."""

    name = 'mask'
    form = Form.MASK
    unfused = None

    def apply(self, state: ScoreState) -> None:
        state.allowed = state.mask.rendered(state.geometry, state.q.device)
        if state.allowed is None or state.inverted:
            return
        scores, lowest = state.scores, max_neg_value(state.scores)
        state.scores = (
            scores.masked_fill(~state.allowed, lowest) if state.shared else scores.masked_fill_(~state.allowed, lowest)
        )


class AddToWeights(ScoreRule):
    """Add what the call gives to the weights, https://openreview.net/forum?id=uomCTwGflg."""

    name = 'attn_delta'
    form = Form.BIAS
    unfused = None

    def apply(self, state: ScoreState) -> None:
        if state.delta is not None:
            # it says nothing of columns that are put in front
            missing = state.scores.shape[-1] - state.delta.shape[-1]
            state.scores = state.scores + pad_at_dim(state.delta, (missing, 0))


class RecordMap(ScoreRule):
    """Keep the scores as they are now, if somebody wants to see them."""

    name = 'record'
    form = Form.RECORD
    unfused = None
    what: ClassVar[str]

    def apply(self, state: ScoreState) -> None:
        if self.what in state.wanted:
            state.records[self.what] = state.scores
            state.shared = True


class RecordSimilarities(RecordMap):
    what = 'similarities'


class RecordScores(RecordMap):
    what = 'scores'


class RecordWeights(RecordMap):
    what = 'weights'
