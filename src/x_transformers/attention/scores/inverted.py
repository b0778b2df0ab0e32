"""Inverted attention: keys are distributed among queries, as among slots. https://openreview.net/forum?id=WgQZNoQ5AB"""

from __future__ import annotations

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.helpers import max_neg_value, single

LEAST = 1e-8
"""A query that got less than this of all keys together gets no average."""


class Inverted(ScoreRule):
    """A step of inverted attention. Between them weights are made as elsewhere, of the scores lying on their side."""

    name = 'inverted_attention'
    form = Form.WHOLE
    unfused = 'each key is shared out among all queries'


class CloseQueries(Inverted):
    """Queries that are padding get nothing of any key; closed keys are seen to when all is shared out."""

    def apply(self, state: ScoreState) -> None:
        state.inverted = True
        if state.rows is not None:
            closed = ~state.rows[:, None, :, None]
            state.scores = state.scores.masked_fill(closed, max_neg_value(state.scores))


class TurnScores(Inverted):
    """Queries are what the weights of a key are over."""

    def apply(self, state: ScoreState) -> None:
        state.scores = state.scores.transpose(-1, -2)


class AverageKeys(Inverted):
    """Back again: what a query got of the keys that it may look at, in parts that sum to one."""

    def apply(self, state: ScoreState) -> None:
        got = state.scores.transpose(-1, -2)
        if state.allowed is not None:
            got = got.masked_fill(~state.allowed, 0.0)
        total = single(got).sum(dim=-1, keepdim=True)
        # a query that got nothing has no slope of 1 / LEAST
        parts = single(got) / total.clamp(min=LEAST).masked_fill(total == 0, 1.0)
        state.scores = parts.to(got.dtype)
