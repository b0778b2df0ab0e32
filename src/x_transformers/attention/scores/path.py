"""PaTH scores: the products of all tokens after the key lie between key and query. https://arxiv.org/abs/2505.16381"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape, tiled_heads
from x_transformers.attention.of_tokens import PathSteps
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.helpers import without_autocast
from x_transformers.tensor_types import Float


def path_scores(
    q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], steps: PathSteps, geometry: ScoreShape
) -> Float[Tensor, 'b h i j']:
    """q_i · H_i H_(i-1) … H_(j+1) k_j; plain products with keys in front, and with keys that are not before the query.

    With W the vectors, B the strengths and N the part of B W Wᵀ below the diagonal, all products at once are
    Q Kᵀ - (Q Wᵀ)_≤ (1 + N)⁻¹ B (W Kᵀ)_<, where ≤ and < keep the vectors up to the query, and behind the key.
    """
    heads, kv_heads, queries = q.shape[1], k.shape[1], q.shape[-2]
    groups, own = heads // kv_heads, k[..., geometry.front :, :]
    vectors = tiled_heads(steps.vectors, kv_heads)
    strengths = tiled_heads(steps.strengths.unsqueeze(-1), kv_heads)
    # the queries of all heads that share a key head, one below the other
    rows = q.unflatten(1, (groups, kv_heads)).transpose(1, 2).flatten(2, 3)
    index = torch.arange(geometry.own, device=q.device)
    number = index[geometry.own - queries :] if steps.queries is None else steps.queries
    met = (rows @ vectors.mT).masked_fill(index > number.repeat(groups).unsqueeze(-1), 0.0)
    between = (strengths * (vectors @ vectors.mT)).tril(-1)
    reached = torch.linalg.solve_triangular(between, met, upper=False, left=False, unitriangular=True)
    removed = (reached * strengths.mT) @ (vectors @ own.mT).tril(-1)
    scores = rows @ k.mT - F.pad(removed, (geometry.front, 0))
    by_head: Tensor = scores.unflatten(2, (groups, queries)).transpose(1, 2).flatten(1, 2)
    return by_head


class PathSimilarity(ScoreRule):
    """Scores, in place of products of queries and keys: products along the path, times the scale. In float32 or wider."""

    name = 'path'
    form = Form.WHOLE
    unfused = 'what lies between a query and a key is no function of the two'

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return bool(getattr(flags, 'path', False))

    def apply(self, state: ScoreState) -> None:
        if state.steps is None:
            raise ValueError('steps must be given to attention along a path, got None. Pass them to Attend.run.')
        wide = torch.promote_types(state.q.dtype, torch.float32)
        with without_autocast(state.q):
            q, k = state.q.to(wide) * state.scale, state.k.to(wide)
            steps = state.steps._replace(vectors=state.steps.vectors.to(wide), strengths=state.steps.strengths.to(wide))
            state.scores = path_scores(q, k, steps, state.geometry).to(torch.promote_types(state.q.dtype, state.k.dtype))
