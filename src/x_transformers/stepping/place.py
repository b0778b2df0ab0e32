"""Where the newest token stands: the row that its keys and values take, what it may look at, how it is turned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.position.rotary import as_turns, turn, turn_by_cos_sin
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.position.bias import Bias
    from x_transformers.position.rotary import RotaryEmbedding

# positions whose angles are made at a time
CHUNK = 256


class Place:
    """The place of one token, the same for all layers.

    Rows of the memory are ``front`` rows for what lies in front of all keys, then one for each token from number ``base`` on.
    ``past``: how far back a token sees; ``padding`` (b p): which of the first p tokens are none.
    """

    # over the rows that ``put`` returns, (b 1 1 n); None: all may be seen
    mask: Bool[Tensor, '#b 1 1 n'] | None = None
    # added to the scores, of models whose positions are biases
    bias: Bias | None = None

    def __init__(
        self,
        *,
        front: int,
        base: int,
        past: int | None = None,
        padding: Bool[Tensor, 'b p'] | None = None,
        rotary: RotaryEmbedding | None = None,
        dim_head: int = 0,
    ) -> None:
        self.front, self.base, self.past = front, base, past
        self.padding = padding
        self.rotary, self.dim_head = rotary, dim_head
        # values of this token in the first layer, for value residuals
        self.first_values: Tensor | None = None

    def put(self, memory: Float[Tensor, 'b kh r d'], new: Float[Tensor, 'b kh 1 d']) -> Float[Tensor, 'b kh n d']:
        """Write the token's row; all rows that may be looked at."""
        raise NotImplementedError

    def turned(self, t: Float[Tensor, 'b h 1 d']) -> Float[Tensor, 'b h 1 d']:
        """With the token's position."""
        raise NotImplementedError


class NextRow(Place):
    """The next row of a memory that is filled from the front: what is looked at is cut out of it, nothing is masked."""

    def __init__(self, **geometry: Any) -> None:
        super().__init__(**geometry)
        self.row = self.first = self.count = 0
        self._turns: Tensor | None = None
        self._turns_from = 0
        self._turn: Tensor | None = None
        self._shown = None if self.padding is None else ~self.padding[:, None, None]

    def move(self, at: int) -> None:
        """To token number ``at``."""
        self.row = self.front + at - self.base
        self.first = 0 if self.past is None else max(0, self.row - self.past)
        self.count = self.row + 1 - self.first
        self.first_values = None
        if self._shown is not None:
            self.mask = self._visible()
        if self.rotary is not None:
            self._turn = self._turn_at(at)

    def _visible(self) -> Bool[Tensor, 'b 1 1 n'] | None:
        shown = self._shown
        if shown is None or self.first >= self.front + shown.shape[-1]:
            return None
        shown = F.pad(shown, (self.front, self.row + 1 - self.front - shown.shape[-1]), value=True)
        return shown[..., self.first :]

    def _turn_at(self, at: int) -> Tensor:
        turns = self._turns
        if turns is None or at - self._turns_from >= turns.shape[1]:
            self._turns_from = at
            rotary: Any = self.rotary
            angles, scale = rotary.halves(torch.arange(at, at + CHUNK, device=rotary.inv_freq.device))
            self._turns = turns = as_turns(angles, scale, self.dim_head)
        return turns.narrow(1, at - self._turns_from, 1)

    def put(self, memory: Float[Tensor, 'b kh r d'], new: Float[Tensor, 'b kh 1 d']) -> Float[Tensor, 'b kh n d']:
        memory.narrow(2, self.row, 1).copy_(new)
        return memory.narrow(2, self.first, self.count)

    def turned(self, t: Float[Tensor, 'b h 1 d']) -> Float[Tensor, 'b h 1 d']:
        return t if self._turn is None else turn(t, self._turn)


class AnyRow(Place):
    """A row whose number is a tensor, so that one compiled program serves all: everything is looked at, through a mask."""

    def __init__(self, rows: int, device: torch.device, **geometry: Any) -> None:
        super().__init__(**geometry)
        self.rows = torch.arange(rows, device=device)
        self.angles: tuple[Tensor, Tensor] | None = None
        self.row: Tensor = self.rows
        self._cos_sin: tuple[Tensor, Tensor] | None = None
        if self.padding is not None:
            # in full length, so that shapes stay the same
            self.padding = F.pad(self.padding, (self.front, rows - self.front - self.padding.shape[1]))

    def begin(self, base: int, padding: Bool[Tensor, 'b p'] | None) -> None:
        """The memory now belongs to another text."""
        self.base = base
        if self.padding is not None and padding is not None:
            self.padding.zero_()
            self.padding[:, self.front : self.front + padding.shape[1]] = padding
        if self.rotary is not None:
            angles, _ = self.rotary.halves(self.rows + base)
            whole = F.pad(angles[0], (0, self.dim_head // 2 - angles.shape[-1])).repeat_interleave(2, dim=-1)
            made = whole.cos(), whole.sin()
            if self.angles is None:
                self.angles = made
            for held, new in zip(self.angles, made, strict=True):
                held.copy_(new)

    def move(self, row: Int[Tensor, ' 1']) -> None:
        """To the token that takes row ``row`` of those behind the front ones."""
        self.row = row + self.front
        mask = self.rows <= self.row
        if self.past is not None:
            mask = mask & (self.rows >= self.row - self.past)
        mask = mask[None]
        if self.padding is not None:
            mask = mask & ~self.padding
        self.mask = mask[:, None, None]
        self.first_values = None
        if self.angles is not None:
            cos, sin = self.angles
            self._cos_sin = cos.index_select(0, row), sin.index_select(0, row)

    def leave(self) -> None:
        """Forget the token: what a compiled program has put here it would otherwise have to hand out."""
        self.row = self.rows
        self.mask = self._cos_sin = self.first_values = None

    def put(self, memory: Float[Tensor, 'b kh r d'], new: Float[Tensor, 'b kh 1 d']) -> Float[Tensor, 'b kh n d']:
        memory.index_copy_(2, self.row, new)
        return memory

    def turned(self, t: Float[Tensor, 'b h 1 d']) -> Float[Tensor, 'b h 1 d']:
        return t if self._cos_sin is None else turn_by_cos_sin(t, *self._cos_sin)
