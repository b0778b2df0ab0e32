"""Recycling: feed the stack's output back into its input several times (https://www.nature.com/articles/s41586-021-03819-2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from x_transformers.layers.arguments import check_number
from x_transformers.randomness import whole
from x_transformers.tensor_types import Float

R = TypeVar('R')


def rounds(asked: int | None, *, recycling: bool, training: bool, longest: int) -> int:
    """How often the stack is run: as asked, or drawn from 1 to ``longest`` in training."""
    if not recycling:
        check_number('recycle_steps', asked)
        if asked is not None and asked != 1:
            raise ValueError(f'recycle_steps must be None or 1 without recycling=True, got {asked}. Build the model with it.')
        return 1
    if asked is None:
        if not training:
            raise ValueError(
                'recycle_steps must be given when a model with recycling=True is evaluated; it is drawn only in training.'
            )
        return whole(1, longest)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise ValueError(f'recycle_steps must be a whole number from 1, got {asked!r}.')
    return asked


def recycle(
    run: Callable[[Float[Tensor, 'b n d']], tuple[Float[Tensor, 'b n d'], R]],
    x: Float[Tensor, 'b n d'],
    proj: nn.Module | None,
    steps: int,
) -> tuple[Float[Tensor, 'b n d'], R]:
    """Run the stack ``steps`` times on the input plus the projection of the last output; only the last run has gradients."""
    fed = x
    for _ in range(steps - 1):
        with torch.no_grad():
            last, _record = run(fed)
        fed = x + proj(last)  # type: ignore[misc]
    return run(fed)
