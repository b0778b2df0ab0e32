"""Upstream's module path for the attention operation and its helpers; each is defined in another module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.attend import Attend
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.kernels.choose import explain, use_kernel
from x_transformers.attention.scores.contextual import selective_attn
from x_transformers.attention.scores.similarity import qk_l2_dist_squared
from x_transformers.attention.weights import log_prob_from_hard_attend, one_hot_straight_through, sparse_topk_attn
from x_transformers.helpers import at_most_one_of, default, exists, softclamp
from x_transformers.tensor_types import Bool, Shaped

__all__ = [
    'Attend', 'Intermediates', 'at_most_one_of', 'compact', 'create_causal_mask', 'default', 'exists', 'explain',
    'log_prob_from_hard_attend', 'once', 'one_hot_straight_through', 'onnx_create_causal_mask', 'pack_one', 'print_once',
    'qk_l2_dist_squared', 'selective_attn', 'softclamp', 'sparse_topk_attn', 'unpack_one', 'use_kernel',
]  # fmt: skip


def create_causal_mask(i: int, j: int, device: torch.device | str | None) -> Bool[Tensor, 'i j']:
    """True where the key lies in the future of the query (queries right-aligned), i.e. where it is forbidden."""
    return torch.ones(i, j, dtype=torch.bool, device=device).triu(j - i + 1)


def onnx_create_causal_mask(i: int, j: int, device: torch.device | str | None) -> Bool[Tensor, 'i j']:
    """The same by comparing numbers."""
    return torch.arange(j, device=device) > torch.arange(j - i, j, device=device)[:, None]


def compact(items: Iterable[Any]) -> list[Any]:
    """Those that are not None."""
    return [item for item in items if item is not None]


def pack_one(t: Shaped[Tensor, '...'], pattern: str) -> tuple[Tensor, list[torch.Size]]:
    """Fold axes into the one that ``*`` stands for: ``pack_one(t, '* d')``. Also returns what unfolds them."""
    before, after = around_star(pattern)
    middle = t.shape[before : t.ndim - after]
    return t.reshape(*t.shape[:before], -1, *t.shape[t.ndim - after :]), [middle]


def unpack_one(t: Shaped[Tensor, '...'], ps: Sequence[Sequence[int]], pattern: str) -> Tensor:
    """Unfold what ``pack_one`` folded; other axes may have changed."""
    before, after = around_star(pattern)
    return t.reshape(*t.shape[:before], *ps[0], *t.shape[t.ndim - after :])


def around_star(pattern: str) -> tuple[int, int]:
    names = pattern.split()
    if names.count('*') != 1:
        raise ValueError(f"pattern must hold exactly one star, such as 'b * d', got {pattern!r}.")
    place = names.index('*')
    return place, len(names) - place - 1


def once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, which does something the first time only."""
    called = False

    @wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if called:
            return None
        called = True
        return fn(*args, **kwargs)

    return inner


print_once = once(print)
