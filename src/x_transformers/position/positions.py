"""The positions of queries and keys in one call, computed once for all layers, on first use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.helpers import Memo, recall, recomputed_part, remember
from x_transformers.module import last_rows
from x_transformers.position.polar import place
from x_transformers.position.rotary import as_turns, check_table, per_pair, turn, turn_by_cos_sin, turn_halves, twice
from x_transformers.tensor_types import Float, Int, Shaped

if TYPE_CHECKING:
    from x_transformers.cache.layer_cache import LayerCache
    from x_transformers.cache.tape import Tape


class Positions(ABC):
    """Puts positions into queries and keys.

    Tables are aligned on the right: n queries, or m keys, are the last n or m rows of the table. ``cache_form`` says whether
    keys may be cached with their position in them: only if it doesn't depend on later tokens, and doesn't widen the keys.
    """

    cache_form: Literal['positioned', 'raw'] = 'raw'

    def place_queries(self, rows: Int[Tensor, ' i']) -> None:
        """Queries stand at these rows of the table and not at its last ones."""
        raise NotImplementedError(f'{type(self).__name__} takes the last rows for queries')

    @abstractmethod
    def queries(self, q: Float[Tensor, 'b h n d'], heads: int | None = None) -> Float[Tensor, 'b h n e']:
        """Queries with positions; of ``heads`` only the last ones (None: all)."""

    @abstractmethod
    def keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None, before: int = 0) -> Float[Tensor, 'b kh m e']:
        """Keys with positions; ``before``: rows of the table that come after the keys' last one."""

    def unplaced_keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None) -> Float[Tensor, 'b kh m e']:
        """Keys that have no position (memory keys, another model's), in the same width as those of ``keys``."""
        return k


# ---------------------------------------------------------------- rotary


class RotaryTable:
    """What turns one sequence: made for as many of its last rows as are asked for, and kept for the next layer.

    Angles and scales are given once for each pair of channels.
    """

    def __init__(
        self, angles: Float[Tensor, '#b n p'], scale: Float[Tensor, '#b n p'] | float = 1.0, layout: str = 'interleaved'
    ) -> None:
        self.angles = angles
        self.scale = scale
        self.layout = layout
        self._made: Memo = []

    @classmethod
    def of(
        cls, freqs: Float[Tensor, '... n r'], scale: Float[Tensor, '... n r'] | float = 1.0, layout: str = 'interleaved'
    ) -> RotaryTable:
        """From what ``RotaryEmbedding`` returns, where both channels of a pair have the angle."""
        scale = _one_of_each_pair(scale, layout) if isinstance(scale, Tensor) else scale
        return cls(_one_of_each_pair(freqs, layout), scale, layout)

    def rotated(
        self, t: Float[Tensor, 'b h n d'], heads: int | None, before: int = 0, inverse: bool = False, back: bool = False
    ) -> Float[Tensor, 'b h n d']:
        """``inverse``: divide by the scale of each row instead of multiplying; ``back``: undo it all."""
        if heads == 0:
            return t
        if heads is not None and heads < t.shape[1]:
            still = t.shape[1] - heads
            return torch.cat((t[:, :still], self.rotated(t[:, still:], None, before, inverse, back)), dim=1)
        n, dim = t.shape[-2:]
        inverse = inverse and isinstance(self.scale, Tensor)
        if back and not isinstance(self.scale, Tensor) and self.scale != 1.0:
            return RotaryTable(self.angles, 1.0, self.layout).rotated(t / self.scale_of(dim), None, before, back=True)
        if self.layout == 'halves':
            cos, sin = (of_heads(table, t) for table in self._cos_sin(n, dim, before, inverse))
            return turn_halves(t, cos, -sin if back else sin)
        if torch.compiler.is_compiling() or dim % 2 == 1:
            cos, sin = (of_heads(table, t) for table in self._cos_sin(n, dim, before, inverse))
            width = cos.shape[-1]
            turned = turn_by_cos_sin(t[..., :width], cos, -sin if back else sin)
            return turned if width == dim else torch.cat((turned, t[..., width:]), dim=-1)
        turns = self._turns(n, dim, before, inverse)
        turns = turns if turns.shape[1] == 1 else of_heads(turns, t)
        return turn(t, turns.conj() if back else turns)

    def spread(self, rows: int) -> RotaryTable:
        """The same turn for several rows."""
        return RotaryTable(self.angles.expand(-1, rows, -1), self.scale, self.layout)

    def scale_of(self, dim: int) -> Tensor:
        """The factor of each channel of a head of ``dim`` channels, where it is one number for all that turn."""
        width = min(2 * self.angles.shape[-1], dim)
        return F.pad(torch.full_like(self.angles[0, 0, :1], float(self.scale)).expand(width), (0, dim - width), value=1.0)

    def _pairs(self, n: int, dim: int, before: int, inverse: bool) -> tuple[Tensor, Tensor | float]:
        check_table(self.angles.shape[-2], self.angles.shape[-1] * 2, n + before, dim)
        angles = last_rows(self.angles, n + before)[..., :n, :]
        # angles that learn are those of each head
        angles = angles.unsqueeze(1) if angles.ndim == 3 else angles
        if not isinstance(self.scale, Tensor):
            return angles, self.scale
        scale = last_rows(self.scale, n + before)[..., :n, :].unsqueeze(1)
        return angles, scale.reciprocal() if inverse else scale

    def _part(self) -> Hashable:
        """Of a forward in parts, some of which are run again: where angles that learn may be used again."""
        return recomputed_part() if self.angles.requires_grad else None

    def _turns(self, n: int, dim: int, before: int, inverse: bool) -> Tensor:
        """Complex numbers for a whole head: 1 for the pairs that don't turn."""
        key = ('turns', n, dim, before, inverse, self._part() if self.angles.requires_grad else None)
        turns: Tensor | None = recall(self._made, key)
        return remember(self._made, key, as_turns(*self._pairs(n, dim, before, inverse), dim)) if turns is None else turns

    def _cos_sin(self, n: int, dim: int, before: int, inverse: bool) -> tuple[Tensor, Tensor]:
        key = ('cos_sin', n, dim, before, inverse, self._part())
        cached: tuple[Tensor, Tensor] | None = recall(self._made, key)
        if cached is None:
            angles, scale = self._pairs(n, dim, before, inverse)
            cos, sin = angles.cos() * scale, angles.sin() * scale
            if self.layout == 'interleaved':
                cos, sin = twice(cos, self.layout), twice(sin, self.layout)
            cached = remember(self._made, key, (cos, sin))
        return cached


def _one_of_each_pair(table: Float[Tensor, '... n r'], layout: str) -> Float[Tensor, '#b n p']:
    return per_pair(table if table.ndim >= 3 else table.unsqueeze(0), layout)


def of_heads(table: Shaped[Tensor, '#b #h n p'], t: Float[Tensor, 'b h n d']) -> Tensor:
    """For each head of ``t``, (b h n p): one table for all, or that of its key head. Turns are complex numbers."""
    return table if table.shape[1] == 1 else tiled_heads(table, t.shape[1])


class RotaryPositions(Positions):
    """Rotary positions of one call, from what ``RotaryEmbedding`` returns: ``RotaryPositions(*embedding(pos))``.

    ``context``: (freqs, scale) of the keys, where they come from another sequence. ``layout``: which channels
    turn together. ``lasting``: the angles of a key stay what they are when the sequence grows.
    Raises ValueError when queries or keys are longer than their positions.
    """

    def __init__(
        self,
        freqs: Float[Tensor, '#b n r'],
        scale: Float[Tensor, '#b n r'] | float = 1.0,
        context: tuple[Float[Tensor, '#b n r'], Float[Tensor, '#b n r'] | float] | None = None,
        *,
        layout: str = 'interleaved',
        lasting: bool = True,
    ) -> None:
        self._of_queries = RotaryTable.of(freqs, scale, layout)
        self._of_keys = self._of_queries if context is None else RotaryTable.of(*context, layout)
        # the scale of xpos is centred on the whole sequence, so it changes as the sequence grows
        self.cache_form = 'positioned' if lasting and not isinstance(self._of_keys.scale, Tensor) else 'raw'
        self._of_placed: RotaryTable | None = None
        self._of_window: RotaryTable | None = None
        self._kept: Memo = []
        # (layout, factor) of the keys, where they are not the usual ones: what it takes to undo the rotation from angles
        scale = self._of_keys.scale
        form = layout, 1.0 if isinstance(scale, Tensor) else scale
        self.form = None if form == ('interleaved', 1.0) else form

    def begin_window(self, freqs: Float[Tensor, '#b 1 r']) -> None:
        """The angles of the first row that is in sight, where earlier ones have left: places count from there.

        Queries and keys keep their angles, as only their difference counts; what has no place is turned along.
        """
        self._of_window = RotaryTable.of(freqs, 1.0, self._of_keys.layout)

    def place_queries(self, rows: Int[Tensor, ' i']) -> None:
        keys = self._of_keys
        scale = keys.scale.index_select(-2, rows) if isinstance(keys.scale, Tensor) else keys.scale
        self._of_queries = self._of_placed = RotaryTable(keys.angles.index_select(-2, rows), scale, keys.layout)

    def queries(self, q: Float[Tensor, 'b h n d'], heads: int | None = None) -> Float[Tensor, 'b h n d']:
        return self._of_queries.rotated(q, heads)

    def keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None, before: int = 0) -> Float[Tensor, 'b kh m d']:
        return self._of_keys.rotated(k, heads, before, inverse=True)

    def unplaced_keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None) -> Float[Tensor, 'b kh m d']:
        return k if self._of_window is None else self._of_window.spread(k.shape[-2]).rotated(k, heads)

    @property
    def key_rows(self) -> int:
        """For how many keys there are positions."""
        return self._of_keys.angles.shape[-2]

    @property
    def places_new(self) -> bool:
        """Whether the tokens that the queries are of stand somewhere among the rows."""
        return self._of_placed is not None

    def new_keys(self, k: Float[Tensor, 'b kh n d'], heads: int | None = None) -> Float[Tensor, 'b kh n d']:
        """Keys of the tokens that the queries are of, which need not be the table's last rows."""
        return self.keys(k, heads) if self._of_placed is None else self._of_placed.rotated(k, heads, inverse=True)

    def new_angles(self, n: int) -> Float[Tensor, '#b n p']:
        """The angles of those n keys, one for each pair of channels."""
        return last_rows((self._of_keys if self._of_placed is None else self._of_placed).angles, n)

    def keep_angles(self, past: LayerCache, n: int, batch: int) -> None:
        """Append those angles to the cache, so that the rotation can be undone.

        Layers whose tapes of angles are one and the same go on sharing one.
        """
        tape = past.tapes.get('angles')
        longer: Tape | None = recall(self._kept, ('angles', n, batch), tape)
        if longer is None:
            past.extend(angles=self.new_angles(n).expand(batch, -1, -1))
            remember(self._kept, ('angles', n, batch), past.tapes['angles'], tape)
        else:
            past.tapes['angles'] = longer


# ---------------------------------------------------------------- polar


class PolarPositions(Positions):
    """Polar positions of one call, from what ``PolarEmbedding`` returns: ``PolarPositions(*embedding(pos))``.

    Scores depend on the difference of two angles only. So the bias, which keys are said to have added to their angles, is taken
    off the queries' angles instead: it belongs to query heads, and grouped keys need not be repeated for it.
    Raises ValueError when queries or keys are longer than their positions.
    """

    cache_form = 'raw'

    def __init__(self, freqs: Float[Tensor, '#b n d'], bias: Float[Tensor, 'h 1 d']) -> None:
        self.freqs = (freqs if freqs.ndim == 3 else freqs.unsqueeze(0)).unsqueeze(1)
        self.bias = bias
        self._of_queries = self.freqs
        self._made: Memo = []

    def place_queries(self, rows: Int[Tensor, ' i']) -> None:
        self._of_queries = self.freqs.index_select(-2, rows)

    def queries(self, q: Float[Tensor, 'b h n d'], heads: int | None = None) -> Float[Tensor, 'b h n e']:
        self._refuse(heads, q)
        return place(q, *self._cos_sin('queries', q.shape[-2]))

    def keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None, before: int = 0) -> Float[Tensor, 'b kh m e']:
        self._refuse(heads, k)
        return place(k, *self._cos_sin('keys', k.shape[-2], before))

    def unplaced_keys(self, k: Float[Tensor, 'b kh m d'], heads: int | None = None) -> Float[Tensor, 'b kh m e']:
        """At angle 0."""
        still = torch.zeros_like(k)
        return place(k, still + 1.0, still)

    def _cos_sin(self, side: str, n: int, before: int = 0) -> tuple[Tensor, Tensor]:
        key = (side, n, before, torch.is_grad_enabled(), recomputed_part())
        cached: tuple[Tensor, Tensor] | None = recall(self._made, key)
        if cached is None:
            freqs = self._of_queries if side == 'queries' else self.freqs
            if freqs.shape[-2] < n + before:
                raise ValueError(
                    f'polar positions must cover the {n + before} rows that {side} reach over, memories and cached ones '
                    f'too, got {freqs.shape[-2]}. Pass those of all.'
                )
            angles = last_rows(freqs, n + before)[..., :n, :]
            angles = angles - self.bias if side == 'queries' else angles
            cached = remember(self._made, key, (angles.cos(), angles.sin()))
        return cached

    @staticmethod
    def _refuse(heads: int | None, t: Float[Tensor, 'b h n d']) -> None:
        if heads is not None and heads != t.shape[1]:
            raise ValueError(
                f'heads must be all {t.shape[1]} with polar positions, which widen every head, got {heads}. Rotate all of them.'
            )


def unrotated(
    k: Float[Tensor, 'b kh n d'],
    angles: Float[Tensor, 'b n p'],
    heads: int | None,
    form: tuple[str, float] | None = None,
) -> Float[Tensor, 'b kh n d']:
    """Keys as they were before their last ``heads`` heads were rotated; ``form`` as in ``RotaryPositions.form``."""
    layout, factor = form or ('interleaved', 1.0)
    return RotaryTable(angles, factor, layout).rotated(k, heads, back=True)
