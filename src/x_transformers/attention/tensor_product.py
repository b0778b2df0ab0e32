"""Tensor product attention: heads are sums of outer products of two vectors; the cache stores the vectors.

It is a latent whose way up multiplies instead of being learned. https://arxiv.org/abs/2501.06425
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.module import Module
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.flags.attention import AttentionFlags


class OuterProducts(Module):
    """From the factors of a token to its heads: (b n c) -> (b n (heads width)), the mean of ``rank`` outer products.

    The factors begin at channel ``begin``: ``rank`` numbers for each head, then ``rank`` vectors of ``width`` channels.
    """

    def __init__(self, heads: int, width: int, rank: int, begin: int = 0) -> None:
        super().__init__()
        self.heads, self.width, self.rank, self.begin = heads, width, rank, begin

    @property
    def channels(self) -> int:
        return self.rank * (self.heads + self.width)

    def forward(self, factors: Float[Tensor, 'b n c']) -> Float[Tensor, 'b n m']:
        own = factors[..., self.begin : self.begin + self.channels]
        over_heads, over_channels = own.split((self.rank * self.heads, self.rank * self.width), dim=-1)
        products: Tensor = over_heads.unflatten(-1, (self.heads, self.rank)) @ over_channels.unflatten(
            -1, (self.rank, self.width)
        )
        return (products / self.rank).flatten(-2)


class KeyValueFactors(Module):
    """The factors of keys, and behind them those of values."""

    def __init__(self, dim: int, channels_of_keys: int, channels_of_values: int) -> None:
        super().__init__()
        self.of_keys = nn.Linear(dim, channels_of_keys, bias=False)
        self.of_values = nn.Linear(dim, channels_of_values, bias=False)

    def forward(self, keys: Float[Tensor, 'b m d'], values: Float[Tensor, 'b m d'] | None = None) -> Float[Tensor, 'b m c']:
        """``values``: the input of values, where it is another one."""
        return torch.cat((self.of_keys(keys), self.of_values(keys if values is None else values)), dim=-1)


class Projections(NamedTuple):
    """In the places of an attention's own: tokens to factors, and factors to heads."""

    to_latent_q: nn.Linear
    to_latent_kv: KeyValueFactors
    to_q: OuterProducts
    to_k: OuterProducts
    to_v: OuterProducts


def projections(dim: int, dim_context: int, flags: AttentionFlags) -> Projections:
    rank, heads = flags.tensor_product_kv_rank, flags.num_kv_heads
    to_q = OuterProducts(flags.heads, flags.dim_head, flags.tensor_product_q_rank)
    to_k = OuterProducts(heads, flags.dim_head, rank)
    to_v = OuterProducts(heads, flags.value_dim, rank, begin=to_k.channels)
    of_keys_and_values = KeyValueFactors(dim_context, to_k.channels, to_v.channels)
    return Projections(nn.Linear(dim, to_q.channels, bias=False), of_keys_and_values, to_q, to_k, to_v)
