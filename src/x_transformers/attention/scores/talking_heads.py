"""Talking heads: linear mixing of the scores or weights of all heads, https://arxiv.org/abs/2003.02436."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float


def kept_finite(scores: Float[Tensor, 'b h i j']) -> Tensor:
    """Masked scores, the lowest number there is, raised so far that a sum over heads cannot overflow."""
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


class MixingRule(ScoreRule):
    """A rule with one mixer of its own, which ``Attend`` has under the name ``part``."""

    form = Form.WHOLE
    unfused = None
    per_head = True
    part: ClassVar[str]

    def __init__(self, mixer: HeadMixer) -> None:
        self.mixer = mixer

    @classmethod
    def parts(cls, flags: ScoreFlags) -> dict[str, nn.Module | nn.Parameter | None]:
        return {cls.part: HeadMixer(flags.heads or 0) if cls.is_on(flags) else None}

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        mixer = getattr(parts, cls.part)
        return None if mixer is None else cls(mixer)


class MixScores(MixingRule):
    """Before the softmax. The mixed scores are added to the scores, as in the original, which doubles them at the start."""

    name = 'pre_talking_heads'
    part = 'pre_softmax_talking_heads'

    def apply(self, state: ScoreState) -> None:
        scores = state.scores if state.previous is None else kept_finite(state.scores)
        state.scores = state.scores + self.mixer(scores)


class BranchOffScale(MixingRule):
    """Before-scales-after, first half: mix the scores, and keep the result for later."""

    name = 'pre_scale_post_talking_heads'
    part = 'pre_scale_post_talking_heads'

    def apply(self, state: ScoreState) -> None:
        state.gamma = self.mixer(state.scores if state.previous is None else kept_finite(state.scores))
        state.shared = True


class MixWeights(MixingRule):
    """After the softmax."""

    name = 'post_talking_heads'
    part = 'post_softmax_talking_heads'

    def apply(self, state: ScoreState) -> None:
        state.scores = self.mixer(state.scores)


class ScaleWeights(ScoreRule):
    """Before-scales-after, second half: weights times what was kept."""

    name = 'pre_scale_post_talking_heads'
    form = Form.WHOLE
    unfused = None

    def apply(self, state: ScoreState) -> None:
        if state.gamma is not None:
            state.scores = state.scores * state.gamma


def mixing_matrices(parts: Any) -> tuple[Float[Tensor, 'h h'] | None, Float[Tensor, 'h h'] | None, Float[Tensor, 'h h'] | None]:
    """The matrices that mix heads before the weights, behind them and around both, for kernels that know them."""
    mixers = (parts.pre_softmax_talking_heads, parts.post_softmax_talking_heads, parts.pre_scale_post_talking_heads)
    before, after, around = (None if mixer is None else mixer.weight.flatten(1) for mixer in mixers)
    # as in the rule the mixed scores are added to the scores
    before = None if before is None else before + torch.eye(before.shape[0], dtype=before.dtype, device=before.device)
    return before, after, around
