"""Random numbers that depend only on a key, so any worker can make any batch at any time."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from x_transformers.tensor_types import Float, Int

Key = int | str


def seed_of(*key: Key) -> int:
    """A seed of 63 bits from the parts of a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') >> 1


def generator(*key: Key) -> torch.Generator:
    """A generator on the CPU that gives the same numbers for the same key."""
    return torch.Generator().manual_seed(seed_of(*key))


class Draws:
    """Tensors drawn in turn from the generator of one key."""

    def __init__(self, *key: Key) -> None:
        self.generator = generator(*key)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def subsets(self, rows: int, size: int, count: int) -> Tensor:
        """``count`` different numbers below ``size`` per row, in random order (rows count)."""
        return self.uniform(rows, size).topk(count, dim=-1).indices

    def orders(self, rows: int, size: int) -> Tensor:
        """A permutation per row (rows size)."""
        return self.uniform(rows, size).argsort(dim=-1)

    def weighted_subsets(self, rows: int, weights: Float[Tensor, ' size'], count: int) -> Int[Tensor, 'rows count']:
        """``count`` different indices per row, drawn one after the other in proportion to ``weights`` (rows count)."""
        # the largest of log weight + Gumbel noise is a draw in proportion to the weights, the next one a draw from the rest
        noise = -(-self.uniform(rows, len(weights)).clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return (weights.log() + noise).topk(count, dim=-1).indices
