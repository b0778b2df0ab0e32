"""Scores and weights of all heads, mixed as queries and keys determine (DCMHA). https://arxiv.org/abs/2405.08553"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.of_tokens import Composition
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.attention.scores.talking_heads import kept_finite
from x_transformers.flags.scores import ScoreFlags
from x_transformers.tensor_types import Float


def added_by(t: Float[Tensor, 'b h i j'], factors: Float[Tensor, 'b n c'], token: str) -> Float[Tensor, 'b h i j']:
    """What the tokens of one axis, ``token`` (i or j), add: the heads through their two maps, and times their gate."""
    heads = t.shape[1]
    maps, gate = factors.to(t.dtype).split((factors.shape[-1] - heads, heads), dim=-1)
    first, second = maps.unflatten(-1, (2, -1, heads)).unbind(-3)
    narrow = torch.einsum(f'bhij,b{token}rh->brij', t, first)
    gates = gate.transpose(1, 2).unsqueeze(-1 if token == 'i' else -2)
    added: Tensor = torch.einsum(f'brij,b{token}rh->bhij', narrow, second) + t * gates
    return added


def composed(
    t: Float[Tensor, 'b h i j'], by_query: Float[Tensor, 'b i c'], by_key: Float[Tensor, 'b m c']
) -> Float[Tensor, 'b h i j']:
    """Keys in front, of which there are more columns than tokens in ``by_key``, say nothing."""
    by_key = F.pad(by_key, (0, 0, t.shape[-1] - by_key.shape[-2], 0))
    return t + added_by(t, by_query, 'i') + added_by(t, by_key, 'j')


class Compose(ScoreRule):
    """A rule that needs what the tokens say."""

    name = 'composable'
    form = Form.WHOLE
    unfused = 'each pair of tokens mixes all heads in its own way'

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return bool(getattr(flags, 'composable', False))

    def of_tokens(self, state: ScoreState) -> Composition:
        if state.composition is None:
            raise ValueError('composition must be given to composable attention, got None. Pass it to Attend.run.')
        return state.composition


class ComposeScores(Compose):
    """Before the softmax."""

    def apply(self, state: ScoreState) -> None:
        factors = self.of_tokens(state)
        scores = state.scores if state.previous is None else kept_finite(state.scores)
        state.scores = composed(scores, factors.scores_by_query, factors.scores_by_key)


class ComposeWeights(Compose):
    """Behind the softmax."""

    def apply(self, state: ScoreState) -> None:
        factors = self.of_tokens(state)
        state.scores = composed(state.scores, factors.weights_by_query, factors.weights_by_key)
