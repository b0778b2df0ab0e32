"""What is added to scores, and the mask that forbids some."""

from __future__ import annotations

from x_transformers.attention.scores.base import Form, Rule, Sheet
from x_transformers.helpers import max_neg_value, pad_at_dim


class AddPrevious(Rule):
    """Residual attention: add the scores of the layer before, https://arxiv.org/abs/2012.11747."""

    name = 'residual_attn'
    form = Form.WHOLE

    def apply(self, sheet: Sheet) -> None:
        if sheet.previous is not None:
            # a layer without another model's keys has fewer columns in front than one with them; own keys are right-aligned
            missing = sheet.scores.shape[-1] - sheet.previous.shape[-1]
            scores = sheet.scores + pad_at_dim(sheet.previous, (missing, 0))
            # what was forbidden there is the lowest number already: keep the sum a number
            sheet.scores = scores.clamp(min=max_neg_value(scores))


class AddBias(Rule):
    """Add the positional or the user's bias."""

    name = 'attn_bias'
    form = Form.BIAS

    def apply(self, sheet: Sheet) -> None:
        if sheet.bias is not None:
            sheet.scores = sheet.scores + sheet.bias.render(sheet.where)


class ApplyMask(Rule):
    """Forbidden scores become the lowest number there is."""

    name = 'mask'
    form = Form.MASK

    def apply(self, sheet: Sheet) -> None:
        sheet.allowed = sheet.mask.rendered(sheet.where, sheet.q.device)
        if sheet.allowed is None:
            return
        scores, lowest = sheet.scores, max_neg_value(sheet.scores)
        sheet.scores = (
            scores.masked_fill(~sheet.allowed, lowest) if sheet.shared else scores.masked_fill_(~sheet.allowed, lowest)
        )


class Record(Rule):
    """Keep the scores as they are now, if somebody wants to see them."""

    name = 'record'
    form = Form.POINTWISE

    def __init__(self, what: str) -> None:
        self.what = what

    def apply(self, sheet: Sheet) -> None:
        if self.what in sheet.wanted:
            sheet.records[self.what] = sheet.scores
            sheet.shared = True
