"""Biases, added to the scores of one call: those that a user passes, and the base of computed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.helpers import Memo, recall, recomputed_part, remember
from x_transformers.tensor_types import Float


class Bias(ABC):
    """Numbers added to the scores of one call. They are rendered once for all layers that ask for the same shape.

    Columns in front of the own keys (memory keys, a zero key, another model's) get 0.
    """

    def __init__(self) -> None:
        self._rendered: Memo = []

    @abstractmethod
    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, '#b #h r j']:
        """Rows start … stop-1 of the queries over the own keys, or over all keys."""

    def render(self, geometry: ScoreShape) -> Float[Tensor, '#b #h i j']:
        # what was rendered without gradients, or in a part that is run again for them, is of no use elsewhere
        key = (geometry.queries, geometry.keys, geometry.front, torch.is_grad_enabled(), recomputed_part())
        cached: Tensor | None = recall(self._rendered, key)
        if cached is None:
            cached = remember(self._rendered, key, _behind_front(self.between(geometry, 0, geometry.queries), geometry))
        return cached

    def strip(self, geometry: ScoreShape, rows: int, low: int, high: int) -> Float[Tensor, '1 h r m'] | None:
        """The first ``rows`` rows over own keys, those from ``low`` to ``high``-1 keys behind the first of these rows.

        Where only the distance counts, it is good for any block of so many rows. None where more counts.
        """
        return None

    @property
    def by_distance(self) -> bool:
        """Whether there is a strip."""
        return False

    @property
    def needs_gradient(self) -> bool:
        """Whether something that it is made of learns."""
        return True

    def learns(self, geometry: ScoreShape) -> bool:
        """Whether a gradient is wanted."""
        return self.needs_gradient and self.render(geometry).requires_grad


def _behind_front(bias: Float[Tensor, '... i j'], geometry: ScoreShape) -> Tensor:
    missing = geometry.keys - bias.shape[-1]
    return F.pad(bias, (missing, 0)) if missing > 0 else bias


class DenseBias(Bias):
    """A bias that the user has written out: (i j), (h i j) or (b h i j), any axis of which may be 1.

    Its columns are the own keys, or all of them. A bias with more rows than there are queries (while decoding with a cache)
    gives its last ones. Raises ValueError if ranks or lengths do not fit.
    """

    def __init__(self, bias: Float[Tensor, '... i j']) -> None:
        super().__init__()
        if not 2 <= bias.ndim <= 4:
            raise ValueError(f'attn_bias must be (i j), (h i j) or (b h i j), got shape {tuple(bias.shape)}')
        self.bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))

    @property
    def needs_gradient(self) -> bool:
        return self.bias.requires_grad

    def learns(self, geometry: ScoreShape) -> bool:
        return self.needs_gradient

    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, '#b #h r j']:
        rows, columns = self.bias.shape[-2:]
        # compared one by one: the compiler takes symbolic lengths in a tuple for different ones
        fits = columns == 1 or columns == geometry.own or columns == geometry.keys
        if not fits or (rows != 1 and rows < geometry.queries):
            raise ValueError(
                f'attn_bias must be for {geometry.queries} queries and {geometry.own} keys'
                + (f' ({geometry.keys} with those in front)' if geometry.front else '')
                + f', got {rows} and {columns}. Pass one of that size.'
            )
        bias = self.bias
        if columns == 1:
            # the same for all own keys; the columns in front still get none
            bias = bias.expand(-1, -1, -1, geometry.own)
        if rows == 1:
            return bias
        skipped = rows - geometry.queries
        return bias[..., skipped + start : skipped + stop, :]


class SumBias(Bias):
    """Two biases of one call, added."""

    def __init__(self, first: Bias, second: Bias) -> None:
        super().__init__()
        self.parts = first, second

    @property
    def needs_gradient(self) -> bool:
        return any(part.needs_gradient for part in self.parts)

    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, '#b #h r j']:
        first, second = (_behind_front(part.between(geometry, start, stop), geometry) for part in self.parts)
        return first + second


def rendered_bias(bias: Bias, geometry: ScoreShape) -> Float[Tensor, '#b #h i j']:
    """A bias over all columns, one that is the same for all of them too."""
    rendered = bias.render(geometry)
    return rendered.expand(*rendered.shape[:-1], geometry.keys) if rendered.shape[-1] != geometry.keys else rendered
