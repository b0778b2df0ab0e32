"""Tensors, other than queries and keys, that a call computes from its tokens for the score rules."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from x_transformers.tensor_types import Float, Int


class Composition(NamedTuple):
    """Two maps of low rank and a gate, side by side, of each query (b i c) and each own key (b j c)."""

    scores_by_query: Float[Tensor, 'b i c']
    weights_by_query: Float[Tensor, 'b i c']
    scores_by_key: Float[Tensor, 'b j c']
    weights_by_key: Float[Tensor, 'b j c']


class PathSteps(NamedTuple):
    """Of each own key: H = I - strength · vector vectorᵀ. ``queries``: their numbers, where they are not the last keys."""

    vectors: Float[Tensor, 'b kh j d']
    strengths: Float[Tensor, 'b kh j']
    queries: Int[Tensor, ' i'] | None = None
