"""Elementwise functions of scores: soft clamp; the sign that signed attention stores separately."""

from __future__ import annotations

from typing import Any, Self

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.helpers import softclamp


class SoftClamp(ScoreRule):
    """No score beyond ``value``: value * tanh(score / value), https://arxiv.org/abs/2408.00118."""

    name = 'softclamp_logits'
    form = Form.POINTWISE
    unfused = None

    def __init__(self, value: float) -> None:
        self.value = value

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        return cls(flags.logit_softclamp_value) if flags.softclamp_logits else None

    def apply(self, state: ScoreState) -> None:
        state.scores = softclamp(state.scores, self.value)


class SplitSign(ScoreRule):
    """Signed attention (cog), first half: weights are made of the sizes of scores. https://openreview.net/forum?id=ezRrwwbxd0"""

    name = 'cog_signed'
    form = Form.WHOLE
    unfused = 'its weights are no softmax of the scores'

    def apply(self, state: ScoreState) -> None:
        state.sign = state.scores.sign()
        state.scores = state.scores.abs()


class RestoreSign(ScoreRule):
    """Signed attention, second half: a weight gets the sign of its score."""

    name = 'cog_signed'
    form = Form.WHOLE
    unfused = 'its weights are no softmax of the scores'

    def apply(self, state: ScoreState) -> None:
        if state.sign is not None:
            state.scores = state.scores * state.sign
