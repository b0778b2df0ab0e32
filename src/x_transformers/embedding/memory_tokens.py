"""Learned tokens before the sequence, or before every window of it (https://arxiv.org/abs/2006.11527)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.embedding.token import prepend_rows, true_in_front
from x_transformers.helpers import pad_at_dim
from x_transformers.tensor_types import Bool, Float, Int, Shaped


@dataclass(frozen=True)
class MemoryTokens:
    """How memory tokens are laid among the rows of a sequence, and taken out again.

    ``count`` tokens stand in front of everything, or, with ``every``, in front of each window of that many rows. The last
    window is filled up with zeros; those rows come last, so that nothing before them sees them, and are cut off again.
    """

    count: int = 0
    every: int | None = None

    def __bool__(self) -> bool:
        return self.count > 0

    def windows(self, t: Shaped[Tensor, 'b n ...'], value: float) -> Tensor:
        """Axis 1 cut into windows, the last of which is filled up with ``value``: (b n …) to (b w e …)."""
        every = self.every or 1
        t = pad_at_dim(t, (0, -t.shape[1] % every), dim=1, value=value)
        return t.reshape(t.shape[0], -1, every, *t.shape[2:])

    def insert(
        self, tokens: Float[Tensor, 'm d'], x: Float[Tensor, 'b n d'], mask: Bool[Tensor, 'b n'] | None
    ) -> tuple[Float[Tensor, 'b k d'], Bool[Tensor, 'b k'] | None]:
        """The longer sequence and its mask."""
        if not self.every:
            return prepend_rows(tokens.expand(x.shape[0], -1, -1), x, mask)
        x = self.windows(x, 0.0)
        laid = torch.cat((tokens.to(x.dtype).expand(*x.shape[:2], -1, -1), x), dim=2).flatten(1, 2)
        return laid, None if mask is None else self.mask(mask)

    def mask(self, mask: Bool[Tensor, 'b n']) -> Bool[Tensor, 'b k']:
        """The mask of the longer sequence: memory tokens may be looked at, the filling may not."""
        if not self.every:
            return true_in_front(mask, self.count)
        return F.pad(self.windows(mask, False), (self.count, 0), value=True).flatten(1, 2)

    def ids(self, ids: Int[Tensor, 'b n'], value: int) -> Int[Tensor, 'b k']:
        """Token ids of the longer sequence, ``value`` where there is no token."""
        if not self.every:
            return F.pad(ids, (self.count, 0), value=value)
        return F.pad(self.windows(ids, value), (self.count, 0), value=value).flatten(1, 2)

    def remove(self, x: Float[Tensor, 'b k d'], length: int) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, '_ m d']]:
        """(the ``length`` rows of the sequence, the memory tokens: (b m d), or ((b w) m d) for ``w`` windows)."""
        if not self.every:
            return x[:, self.count :], x[:, : self.count]
        windows = x.reshape(x.shape[0], -1, self.count + self.every, x.shape[-1])
        rest = windows[:, :, self.count :].flatten(1, 2)
        return rest[:, :length], windows[:, :, : self.count].flatten(0, 1)
