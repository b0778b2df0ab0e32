"""States of a layer, replaced at every step: they can be reordered, but not rolled back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from x_transformers.tensor_types import Int, Shaped


def without_history(states: Mapping[str, Shaped[Tensor, 'b ...']], carry: Mapping[str, Any]) -> list[str]:
    """The names of what cannot be rolled back: all states, and whatever else holds a tensor."""
    carried = (name for name, value in carry.items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)))
    return [*states, *carried]


def reordered_carry(
    carry: Mapping[str, Any], axes: Mapping[str, int], index: Int[Tensor, ' r'], batch: int | None
) -> dict[str, Any]:
    """The same with these batch rows of each tensor. ``axes``: where the batch is, if it is known."""

    def gather(value: Any, axis: int | None) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.index_select(batch_axis(value, batch) if axis is None else axis, index)

    return {name: tree_map(partial(gather, axis=axes.get(name)), value) for name, value in carry.items()}


def batch_axis(value: Shaped[Tensor, '...'], batch: int | None) -> int:
    # torch's recurrent modules put layers in front of the batch; anything else is taken to be batch first
    if value.ndim != 3 or batch is None or value.shape[1] != batch:
        return 0
    return 1 if value.shape[0] != batch or batch == 1 else 0
