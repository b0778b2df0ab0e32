"""Similarity of a query and a key: their dot product, or minus their squared distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.tensor_types import Float


def qk_l2_dist_squared(q: Float[Tensor, 'b h i d'], k: Float[Tensor, '... j d']) -> Float[Tensor, 'b h i j']:
    """Squared Euclidean distance of every query and key; keys of shape (b j d) are shared by all heads."""
    if k.ndim == 3:
        k = k.unsqueeze(1)
    squares_q, squares_k = q.square().sum(-1, keepdim=True), k.square().sum(-1)[..., None, :]
    return (squares_q + squares_k - 2 * (q @ k.transpose(-1, -2))).clamp(min=0.0)


def as_products(
    q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], *, whole: bool
) -> tuple[Float[Tensor, 'b h i c'], Float[Tensor, 'b kh j c']]:
    """Queries and keys with a few more channels, whose products are minus the squared distances.

    -|q-k|^2 = 2 q.k - |q|^2 - |k|^2, each square as two channels so that half precision keeps its digits. |q|^2 changes
    nothing under a softmax over keys alone; ``whole`` adds it nevertheless, for a softmax over something else as well.
    """
    ones_q, ones_k = torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1])
    squares_k = minus_square(k)
    channels_q, channels_k = [2 * q, *(ones_q for _ in squares_k)], [k, *squares_k]
    if whole:
        squares_q = minus_square(q)
        channels_q += squares_q
        channels_k += [ones_k for _ in squares_q]
    q, k = torch.cat(channels_q, dim=-1), torch.cat(channels_k, dim=-1)
    missing = -q.shape[-1] % 8 if q.is_cuda else 0
    return (F.pad(q, (0, missing)), F.pad(k, (0, missing))) if missing else (q, k)


def minus_square(t: Float[Tensor, '... d']) -> list[Tensor]:
    """-|t|^2, as one channel, or in half precision as two that add up to it."""
    if t.dtype in (torch.float32, torch.float64):
        return [-t.square().sum(-1, keepdim=True)]
    square = -t.float().square().sum(-1, keepdim=True)
    high = square.to(t.dtype)
    return [high, (square - high.float()).to(t.dtype)]


class Similarity(ScoreRule):
    """Scores: queries times keys, times the scale."""

    name = 'similarity'
    form = Form.REWRITE
    unfused = None

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return not (flags.l2_distance or getattr(flags, 'path', False))

    def apply(self, state: ScoreState) -> None:
        state.scores = (state.q * state.scale) @ tiled_heads(state.k, state.q.shape[1]).transpose(-1, -2)


class Distance(ScoreRule):
    """Scores: minus the squared distance of query and key, times the scale."""

    name = 'l2_distance'
    form = Form.REWRITE
    unfused = None

    def apply(self, state: ScoreState) -> None:
        state.scores = qk_l2_dist_squared(state.q, tiled_heads(state.k, state.q.shape[1])) * -state.scale
