"""Relative projected bias: each query mixes its own bias from a few learned functions of the distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.flags.attention import AttentionFlags
from x_transformers.module import Module, empty_parameter
from x_transformers.position.bias import Bias
from x_transformers.position.forgetting import placed_queries
from x_transformers.tensor_types import Float, Int

if TYPE_CHECKING:
    from x_transformers.cache.layer_cache import LayerCache


class ProjectedBias(Bias):
    """``sum_k weights[h, i, k] * bank[k, i - j]`` where the distance is 0 or more and in the bank, else 0."""

    def __init__(
        self, weights: Float[Tensor, 'b h i k'], bank: Float[Tensor, 'k r'], queries: Int[Tensor, 'i'] | None = None
    ) -> None:
        """``queries``: their places among the own keys, where these are not the last ones."""
        super().__init__()
        self.weights = weights
        self.bank = bank
        self.queries = queries

    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, 'b h r j']:
        by_distance = self.weights[..., start:stop, :] @ self.bank.to(self.weights.dtype)
        if self.queries is None:
            query = torch.arange(geometry.first + start, geometry.first + stop, device=by_distance.device)[:, None]
        else:
            query = self.queries[start:stop, None]
        distance = query - torch.arange(geometry.own, device=by_distance.device)
        far = self.bank.shape[-1] - 1
        index = distance.clamp(0, far).expand(*by_distance.shape[:-1], -1)
        return by_distance.gather(-1, index).masked_fill((distance < 0) | (distance > far), 0.0)


class RelativeProjectedBias(Module):
    """The mixing weights, a linear map of the layer's input, and the bank of ``num_basis`` functions of the distance."""

    replaces = False

    def __init__(self, dim: int, heads: int, num_basis: int, max_dist: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_distance_weights = nn.Sequential(nn.Linear(dim, heads * num_basis))
        self.distance_bank = empty_parameter(num_basis, max_dist)
        self.init_own()

    def init_own(self) -> None:
        nn.init.normal_(self.distance_bank, std=0.02)

    @classmethod
    def from_flags(cls, dim: int, flags: AttentionFlags) -> RelativeProjectedBias | None:
        if not flags.use_rel_proj_pos_bias:
            return None
        return cls(dim, flags.heads, flags.rel_proj_num_distance_basis, flags.rel_proj_max_dist)

    def bias(
        self, x: Float[Tensor, 'b n d'], past: LayerCache | None = None, mem: Float[Tensor, 'b l d'] | None = None, **_: Any
    ) -> ProjectedBias:
        weights: Tensor = self.to_distance_weights(x)
        by_head = weights.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return ProjectedBias(by_head, self.distance_bank, placed_queries(past, x.shape[-2], mem))
