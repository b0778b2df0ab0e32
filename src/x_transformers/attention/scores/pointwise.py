"""Functions of one score at a time: soft clamp; the sign that signed attention keeps aside."""

from __future__ import annotations

from x_transformers.attention.scores.base import Form, Rule, Sheet
from x_transformers.helpers import softclamp


class SoftClamp(Rule):
    """No score beyond ``value``: value * tanh(score / value), https://arxiv.org/abs/2408.00118."""

    name = 'softclamp_logits'
    form = Form.POINTWISE

    def __init__(self, value: float) -> None:
        self.value = value

    def apply(self, sheet: Sheet) -> None:
        sheet.scores = softclamp(sheet.scores, self.value)


class SetSignAside(Rule):
    """Signed attention (cog), first half: weights are made of the sizes of scores. https://openreview.net/forum?id=ezRrwwbxd0"""

    name = 'cog_signed'
    form = Form.WHOLE

    def apply(self, sheet: Sheet) -> None:
        sheet.sign = sheet.scores.sign()
        sheet.scores = sheet.scores.abs()


class GiveSignBack(Rule):
    """Signed attention, second half: a weight gets the sign of its score."""

    name = 'cog_signed'
    form = Form.WHOLE

    def apply(self, sheet: Sheet) -> None:
        if sheet.sign is not None:
            sheet.scores = sheet.scores * sheet.sign
