"""Scalable softmax: scores grow with the number of keys, so many keys do not flatten the weights.

https://arxiv.org/abs/2501.19399
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.flags.scores import ScoreFlags
from x_transformers.module import empty_parameter
from x_transformers.tensor_types import Float

# one over the mean of log n for n up to 1,024: scores of the usual size in sequences of that length
START = 0.168


def query_factor(scales: Float[Tensor, 'h'], mask: Mask, geometry: ScoreShape) -> Float[Tensor, '#b h #i 1']:
    """s · log n, which the queries are multiplied by; n is the number of keys that each of them sees."""
    dtype = torch.promote_types(scales.dtype, torch.float32)
    seen = mask.seen(geometry, scales.device).clamp(min=1).to(dtype)
    return scales.to(dtype).view(1, -1, 1, 1) * seen.log()


def scaled_queries(q: Float[Tensor, 'b h i d'], factor: Float[Tensor, '#b h #i 1'] | None) -> Float[Tensor, 'b h i d']:
    return q if factor is None else (q * factor).to(q.dtype)


class ScaleQueries(ScoreRule):
    """Before they meet keys, queries are multiplied by ``query_factor``."""

    name = 'scalable_softmax'
    form = Form.REWRITE
    unfused = None
    per_head = True

    @classmethod
    def parts(cls, flags: ScoreFlags) -> dict[str, nn.Module | nn.Parameter | None]:
        return {'softmax_scales': empty_parameter(flags.heads or 0) if flags.scalable_softmax else None}

    @classmethod
    def init_parts(cls, parts: Any) -> None:
        nn.init.constant_(parts.softmax_scales, START)

    def apply(self, state: ScoreState) -> None:
        state.q = scaled_queries(state.q, state.factor)
