"""A learned sink: one more score in each row, without a value, which can absorb attention."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.module import empty_parameter
from x_transformers.tensor_types import Float


class PutSink(ScoreRule):
    """A column in front, the same learned number for every row of a head."""

    name = 'head_learned_sink'
    form = Form.SINK
    unfused = None
    per_head = True

    def __init__(self, sink: Float[Tensor, 'h']) -> None:
        self.sink = sink

    @classmethod
    def parts(cls, flags: ScoreFlags) -> dict[str, nn.Module | nn.Parameter | None]:
        return {'head_attn_sink': empty_parameter(flags.heads or 0) if flags.head_learned_sink else None}

    @classmethod
    def init_parts(cls, parts: Any) -> None:
        nn.init.zeros_(parts.head_attn_sink)

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        return None if parts.head_attn_sink is None else cls(parts.head_attn_sink)

    def apply(self, state: ScoreState) -> None:
        batch, heads, queries, _ = state.scores.shape
        column = self.sink.to(state.scores.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        if state.sign is not None:
            state.sign = torch.cat((column.sign(), state.sign), dim=-1)
            column = column.abs()
        state.scores = torch.cat((column, state.scores), dim=-1)


class DropSink(ScoreRule):
    """What went to the sink is lost."""

    name = 'head_learned_sink'
    form = Form.SINK
    unfused = None

    def apply(self, state: ScoreState) -> None:
        state.scores = state.scores[..., 1:]
