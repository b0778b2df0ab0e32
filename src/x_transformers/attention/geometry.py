"""The shape of a score matrix: the meaning of its columns, and the key head of each query head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from x_transformers.tensor_types import Float


class ScoreShape(NamedTuple):
    """Geometry of a score matrix.

    ``keys`` counts all columns. The first ``front`` of them were put in front of the sequence (zero, external and memory
    keys): positional rules and causality leave them alone. Queries are right-aligned with the remaining, own keys.
    """

    queries: int
    keys: int
    front: int = 0

    @property
    def own(self) -> int:
        return self.keys - self.front

    @property
    def first(self) -> int:
        """Index among the own keys of the first query."""
        return self.keys - self.front - self.queries

    @property
    def is_open(self) -> bool:
        """Whether an exporter or a compiler has left lengths open, so that nothing may be decided by them."""
        if not (isinstance(self.queries, int) and isinstance(self.keys, int)):
            return True
        return torch.compiler.is_compiling() and not (is_fixed(self.queries) and is_fixed(self.keys))

    def with_front(self, columns: int) -> ScoreShape:
        """The same after ``columns`` more keys were put in front."""
        return ScoreShape(self.queries, self.keys + columns, self.front + columns)


def is_fixed(size: int) -> bool:
    """Whether a compiler knows this size; what is decided by one that it leaves open is compiled again for other lengths."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def tiled_heads(t: Float[Tensor, 'b kh n d'], heads: int) -> Float[Tensor, 'b h n d']:
    """Keys or values for every query head: query head h uses head h mod kv_heads."""
    kv_heads = t.shape[1]
    if kv_heads == heads:
        return t
    return t.expand(-1, heads, -1, -1) if kv_heads == 1 else t.repeat(1, heads // kv_heads, 1, 1)
