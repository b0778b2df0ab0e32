"""Talking heads: the scores or weights of all heads are mixed, https://arxiv.org/abs/2003.02436."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.attention.scores.base import Form, Rule, Sheet
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float


def kept_finite(scores: Tensor) -> Tensor:
    """Forbidden scores, the lowest number there is, raised so far that a sum over heads cannot overflow."""
    limit = torch.finfo(scores.dtype).max ** 0.75
    return scores.clamp(-limit, limit)


class HeadMixer(Module):
    """Each head becomes a sum over all heads: a 1x1 convolution over the head axis that starts as the identity."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = empty_parameter(heads, heads, 1, 1)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.dirac_(self.weight)

    def forward(self, t: Float[Tensor, 'b h i j']) -> Float[Tensor, 'b h i j']:
        return mix_heads(self.weight, t)


def mix_heads(weight: Float[Tensor, 'g h 1 1'], t: Float[Tensor, 'b h i j']) -> Float[Tensor, 'b g i j']:
    return torch.einsum('gh,bhij->bgij', weight.flatten(1), t)


class MixScores(Rule):
    """Before the softmax. The mixed scores are added to the scores, as in the original, which doubles them at the start."""

    name = 'pre_talking_heads'
    form = Form.WHOLE

    def __init__(self, mixer: HeadMixer) -> None:
        self.mixer = mixer

    def apply(self, sheet: Sheet) -> None:
        scores = sheet.scores if sheet.previous is None else kept_finite(sheet.scores)
        sheet.scores = sheet.scores + self.mixer(scores)


class BranchOffScale(Rule):
    """Before-scales-after, first half: mix the scores, and keep the result for later."""

    name = 'pre_scale_post_talking_heads'
    form = Form.WHOLE

    def __init__(self, mixer: HeadMixer) -> None:
        self.mixer = mixer

    def apply(self, sheet: Sheet) -> None:
        sheet.gamma = self.mixer(sheet.scores if sheet.previous is None else kept_finite(sheet.scores))
        sheet.shared = True


class MixWeights(Rule):
    """After the softmax."""

    name = 'post_talking_heads'
    form = Form.WHOLE

    def __init__(self, mixer: HeadMixer) -> None:
        self.mixer = mixer

    def apply(self, sheet: Sheet) -> None:
        sheet.scores = self.mixer(sheet.scores)


class ScaleWeights(Rule):
    """Before-scales-after, second half: weights times what was kept."""

    name = 'pre_scale_post_talking_heads'
    form = Form.WHOLE

    def apply(self, sheet: Sheet) -> None:
        if sheet.gamma is not None:
            sheet.scores = sheet.scores * sheet.gamma
