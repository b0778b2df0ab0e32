"""The written length of a cache of fixed capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.tensor_types import Int


class Cursor:
    """Numbers as tensors, so that one compiled program serves every token.

    - ``row``: where the next row is written; ``seen``: rows seen, those that were dropped before too;
    - ``capacity``: rows of each tape; ``reach``: how many rows a token sees at most, itself included; None: all.
    """

    __slots__ = ('capacity', 'reach', 'row', 'seen')

    def __init__(self, row: Int[Tensor, ' 1'], seen: Int[Tensor, ' 1'], capacity: int, reach: int | None = None) -> None:
        self.row, self.seen = row, seen
        self.capacity, self.reach = capacity, reach

    def moved(self, rows: int) -> Cursor:
        return Cursor(self.row + rows, self.seen + rows, self.capacity, self.reach)

    def rows(self, before: int, after: int) -> Int[Tensor, ' n']:
        """Numbers of the rows from ``before`` rows before the next one to ``after`` rows behind it."""
        return self.row + torch.arange(-before, after, device=self.row.device)
