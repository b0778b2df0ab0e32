"""A learned sink: one more score in each row, with no value behind it, that a head may spend its attention on."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.attention.scores.base import Form, Rule, Sheet
from x_transformers.tensor_types import Float


class PutSink(Rule):
    """A column in front, the same learned number for every row of a head."""

    name = 'head_learned_sink'
    form = Form.SINK

    def __init__(self, sink: Float[Tensor, 'h']) -> None:
        self.sink = sink

    def apply(self, sheet: Sheet) -> None:
        batch, heads, queries, _ = sheet.scores.shape
        column = self.sink.to(sheet.scores.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        if sheet.sign is not None:
            sheet.sign = torch.cat((column.sign(), sheet.sign), dim=-1)
            column = column.abs()
        sheet.scores = torch.cat((column, sheet.scores), dim=-1)


class DropSink(Rule):
    """What went to the sink is lost."""

    name = 'head_learned_sink'
    form = Form.SINK

    def apply(self, sheet: Sheet) -> None:
        sheet.scores = sheet.scores[..., 1:]
