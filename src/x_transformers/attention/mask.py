"""The attention mask. True always means: may attend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.helpers import Memo, recall, remember, values_known
from x_transformers.tensor_types import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Several sequences laid end to end in one batch row: where each begins and ends, among queries and among keys."""

    starts_q: Int[Tensor, 's']
    starts_k: Int[Tensor, 's']
    longest_q: int | None = None
    longest_k: int | None = None
    memo: Memo = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(cls, value: PackedSequences | Mapping[str, Any], *, causal: bool = False) -> PackedSequences:
        """From the keywords ``cu_seqlens_q``, ``cu_seqlens_k`` and, optionally, ``max_seqlen_q``, ``max_seqlen_k``.

        Raises ValueError unless both are whole numbers in one axis, of equal shape, strictly increasing, and, when
        ``causal``, equal.
        """
        if isinstance(value, PackedSequences):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f'flash_pack_seq_kwargs must be a dictionary with cu_seqlens_q and cu_seqlens_k, got {value!r}')
        missing = [name for name in ('cu_seqlens_q', 'cu_seqlens_k') if value.get(name) is None]
        if missing:
            raise ValueError(
                f'flash_pack_seq_kwargs must hold {" and ".join(missing)}: the cumulative lengths of the packed sequences.'
            )
        starts_q, starts_k = value['cu_seqlens_q'], value['cu_seqlens_k']
        for name, starts in (('cu_seqlens_q', starts_q), ('cu_seqlens_k', starts_k)):
            if not isinstance(starts, Tensor) or starts.ndim != 1 or starts.is_floating_point() or starts.dtype == torch.bool:
                raise ValueError(f'{name} must be a 1-D tensor of whole numbers such as [0, 5, 12], got {describe(starts)}')
        if starts_q.shape != starts_k.shape:
            raise ValueError(
                f'cu_seqlens_q and cu_seqlens_k must name the same number of sequences, '
                f'got shapes {tuple(starts_q.shape)} and {tuple(starts_k.shape)}'
            )
        if values_known(starts_q) and values_known(starts_k):
            check_starts(starts_q, starts_k, causal)
        return cls(starts_q, starts_k, value.get('max_seqlen_q'), value.get('max_seqlen_k'))

    def unpacked(self, x: Float[Tensor, '1 n d']) -> tuple[Float[Tensor, 's m d'], Bool[Tensor, 's m']]:
        """(each sequence in a row of its own, which rows are tokens)."""
        lengths = self.starts_q.diff()
        longest = int(lengths.max()) if self.longest_q is None else self.longest_q
        place = torch.arange(longest, device=x.device)
        tokens = place < lengths.to(x.device).unsqueeze(-1)
        index = (self.starts_q[:-1].to(x.device).unsqueeze(-1) + place).clamp(max=x.shape[1] - 1)
        return x[0][index].masked_fill(~tokens.unsqueeze(-1), 0.0), tokens

    def packed_again(self, x: Float[Tensor, 's m d']) -> Float[Tensor, '1 n d']:
        """Sequences in rows of their own, end to end."""
        lengths = self.starts_q.diff().to(x.device)
        number = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), lengths)
        place = torch.arange(number.shape[0], device=x.device) - self.starts_q.to(x.device)[number]
        return x[number, place].unsqueeze(0)

    def segments(self, geometry: ScoreShape) -> tuple[Int[Tensor, '1 i'], Int[Tensor, '1 j']]:
        """The number of the sequence that each query, and each own key, belongs to."""
        key = (geometry.queries, geometry.own)
        cached = recall(self.memo, key)
        if cached is None:
            cached = remember(
                self.memo, key, (segment_ids(self.starts_q, geometry.queries), segment_ids(self.starts_k, geometry.own))
            )
        queries, keys = cached
        return queries, keys


def narrower(one: int | None, other: int | None) -> int | None:
    """The smaller of two windows; None is none."""
    return other if one is None else one if other is None else min(one, other)


def over_columns(mask: Bool[Tensor, '... i k'], own: int, columns: int) -> Bool[Tensor, '... i j']:
    """A mask over all ``columns``: one column speaks of every own key, and those that it lacks on the left are open."""
    if mask.shape[-1] == 1 and columns != 1:
        mask = mask.expand(*mask.shape[:-1], own)
    missing = columns - mask.shape[-1]
    return F.pad(mask, (missing, 0), value=True) if missing else mask


def describe(value: Any) -> str:
    return f'shape {tuple(value.shape)} of {value.dtype}' if isinstance(value, Tensor) else repr(value)


def check_starts(starts_q: Int[Tensor, ' s'], starts_k: Int[Tensor, ' s'], causal: bool) -> None:
    for name, starts in (('cu_seqlens_q', starts_q), ('cu_seqlens_k', starts_k)):
        if not bool((starts[1:] > starts[:-1]).all()):
            raise ValueError(f'{name} must be strictly increasing, got {starts.tolist()}')
    if causal and not torch.equal(starts_q, starts_k):
        raise ValueError(
            'cu_seqlens_q must equal cu_seqlens_k in causal attention over packed sequences, '
            f'got {starts_q.tolist()} and {starts_k.tolist()}.'
        )


def segment_ids(starts: Int[Tensor, 's'], length: int) -> Int[Tensor, '1 n']:
    positions = torch.arange(length, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts[1:].contiguous(), positions, right=True)[None]


def places(starts: Int[Tensor, 's'], length: int) -> Int[Tensor, '1 n']:
    """The position of each token in its own sequence."""
    return torch.arange(length, device=starts.device) - starts[segment_ids(starts, length)]


class Placed(NamedTuple):
    """Queries that are not the last of the own keys, because behind them lies memory that is not yet written.

    ``first``: number of the first query among the own keys; a tensor, so that a compiled program serves every token.
    """

    first: Int[Tensor, ' 1']
    queries: int
    keys: int

    def numbers(self) -> Int[Tensor, 'i']:
        return self.first + torch.arange(self.queries, device=self.first.device)

    def seen(
        self,
        causal: bool,
        past: int | None,
        ahead: int | None,
        prefix: int | Int[Tensor, 'b'] | None,
        strict: bool = False,
    ) -> Bool[Tensor, 'i j'] | Bool[Tensor, 'b 1 i j']:
        """Causality, windows and prefix, written out."""
        query, key = self.numbers().unsqueeze(-1), torch.arange(self.keys, device=self.first.device)
        mask = key <= query
        if prefix is not None and causal:
            mask = mask | (key < (prefix.reshape(-1, 1, 1, 1) if isinstance(prefix, Tensor) else prefix))
        elif not causal:
            mask = torch.ones_like(mask) if ahead is None else key - query <= ahead
        mask = mask & (key != query) if strict else mask
        return mask if past is None else mask & (query - key <= past)


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may look at whom: the fields combine by *and*.

    ``causal``   a query sees keys up to its own position (queries are right-aligned with the own keys).
    ``strict``   a query does not see its own key.
    ``past``     a query sees at most so many keys back.
    ``ahead``    a query sees at most so many keys ahead, where causality does not forbid them all.
    ``keys``     (b j) which own keys may be seen: padding, left padding.
    ``front``    (b f) which of the last f columns put in front may be seen; without it all of them.
    ``prefix``   everyone sees keys before it, causality notwithstanding: one number, or one for each row (b).
    ``dense``    (i j), (h i j) or (b h i j), axes of 1 broadcast; columns are own keys, or all.
    ``packed``   sequences laid end to end see only themselves.
    ``placed``   where the queries are, if they are not the last of the own keys. ``narrowed`` writes out what follows from it.
    """

    causal: bool = False
    past: int | None = None
    ahead: int | None = None
    keys: Bool[Tensor, 'b j'] | None = None
    front: Bool[Tensor, 'b f'] | None = None
    prefix: int | Int[Tensor, 'b'] | None = None
    dense: Bool[Tensor, '... i k'] | None = None
    packed: PackedSequences | None = None
    placed: Placed | None = None
    strict: bool = False
    memo: Memo = field(default_factory=list, init=False, repr=False)

    def having(self, **changes: Any) -> Mask:
        """A mask with other fields (and nothing remembered)."""
        return replace(self, **changes)

    def narrowed(self, causal: bool, past: int | None, ahead: int | None = None, strict: bool = False) -> Mask:
        """This mask and causality and windows, and nobody's own key if ``strict``.

        The same object for the same question, so that layers share what it renders.
        """
        causal = causal or self.causal
        past = self.past if past is None else narrower(past, self.past)
        ahead = None if causal else narrower(ahead, self.ahead)
        if self.placed is None and (causal, past, ahead, strict) == (self.causal, self.past, self.ahead, self.strict):
            return self
        key = ('narrowed', causal, past, ahead, strict)
        cached: Mask | None = recall(self.memo, key)
        if cached is None:
            limits = {'causal': causal, 'past': past, 'ahead': ahead, 'strict': strict}
            mask = self.having(**limits) if self.placed is None else self._written_out(self.placed, **limits)
            cached = remember(self.memo, key, mask)
        return cached

    def _written_out(self, placed: Placed, **limits: Any) -> Mask:
        seen = placed.seen(**limits, prefix=self.prefix)
        if self.dense is not None:
            columns = max(placed.keys, self.dense.shape[-1])
            seen = over_columns(self.dense, placed.keys, columns) & over_columns(seen, placed.keys, columns)
        return self.having(causal=False, past=None, ahead=None, prefix=None, placed=None, dense=seen)

    def within(self, packed: PackedSequences | None) -> Mask:
        """This mask, inside packed sequences."""
        if packed is None or packed is self.packed:
            return self
        cached: Mask | None = recall(self.memo, ('within',), packed)
        return remember(self.memo, ('within',), self.having(packed=packed), packed) if cached is None else cached

    # ------------------------------------------------------------ questions answered without looking at a tensor's values

    @property
    def trivial(self) -> bool:
        return not self.depends_on_distance and not self.per_token

    @property
    def depends_on_distance(self) -> bool:
        """Whether the distance between query and key plays a part."""
        return self.causal or self.strict or self.past is not None or self.ahead is not None

    @property
    def per_token(self) -> bool:
        """Whether it depends on more than the distance between query and key."""
        return any(part is not None for part in (self.keys, self.front, self.dense, self.packed)) or (
            self.prefix is not None and self.causal
        )

    @property
    def only_padding(self) -> bool:
        """Whether it is about keys alone, beside causality."""
        others = (self.past, self.ahead, self.front, self.prefix, self.dense, self.packed)
        return not self.strict and all(part is None for part in others)

    def limits_future(self, geometry: ScoreShape) -> bool:
        """Whether causality forbids anything: not for one query."""
        if not self.causal:
            return False
        queries, keys = geometry.queries, geometry.keys
        return geometry.is_open or queries > 1 or keys - geometry.front < queries

    def limits_past(self, geometry: ScoreShape) -> bool:
        """Whether the window forbids anything."""
        return self.past is not None and (geometry.is_open or self.past < geometry.own - 1)

    def limits_ahead(self, geometry: ScoreShape) -> bool:
        """Whether the window into the future forbids anything."""
        return not self.causal and self.ahead is not None and (geometry.is_open or self.ahead < geometry.queries - 1)

    def limits(self, geometry: ScoreShape) -> tuple[int | None, int | None]:
        """How far a query sees back and ahead, causality included; None as far as there are keys. Not for a prefix."""
        ahead = 0 if self.limits_future(geometry) else self.ahead if self.limits_ahead(geometry) else None
        return self.past if self.limits_past(geometry) else None, ahead

    def plain_causal(self, geometry: ScoreShape) -> bool:
        """Only causality is asked, of as many queries as keys."""
        return (
            self.limits_future(geometry)
            and not self.limits_past(geometry)
            and not self.per_token
            and not self.strict
            and geometry.queries == geometry.keys
        )

    def may_hide_all(self, geometry: ScoreShape) -> bool:
        """Whether some query may have nothing to look at."""
        closable = 0 if self.front is None else self.front.shape[-1]
        if geometry.front > closable and (self.dense is None or self.dense.shape[-1] != geometry.keys):
            return False
        hides = any(part is not None for part in (self.keys, self.dense, self.packed))
        return hides or self.strict or geometry.own == 0 or ((self.causal or self.ahead is not None) and geometry.first < 0)

    # ------------------------------------------------------------ the same as tensors

    def rendered(self, geometry: ScoreShape, device: torch.device | str | None = None) -> Bool[Tensor, '#b #h i j'] | None:
        """The mask as one tensor that broadcasts to (b h i j); None where everything is allowed.

        Never larger than what it depends on: padding alone is (b 1 1 j), padding and causality (b 1 i j). Made once.
        """
        key = ('rendered', geometry.queries, geometry.keys, geometry.front)
        cached: tuple[Tensor | None] | None = recall(self.memo, key)
        if cached is None:
            cached = remember(
                self.memo, key, (self.part(geometry, self.device_or(device), (0, geometry.queries), (0, geometry.own)),)
            )
        return cached[0]

    def apart_from_distance(self) -> Mask:
        """What is left when causality and windows are seen to otherwise (a prefix goes with them)."""
        if not self.depends_on_distance:
            return self
        cached: Mask | None = recall(self.memo, ('apart',))
        return (
            remember(self.memo, ('apart',), self.having(causal=False, past=None, ahead=None, prefix=None))
            if cached is None
            else cached
        )

    def device_or(self, device: torch.device | str | None) -> torch.device | str | None:
        for part in (self.keys, self.dense, self.front):
            if part is not None:
                return part.device
        return device

    def part(
        self, geometry: ScoreShape, device: torch.device | str | None, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Bool[Tensor, '#b #h i j'] | None:
        """The mask of some rows over the front and over some of the own columns."""
        own = columns[1] - columns[0]
        pieces = [piece for piece in self.over_own(geometry, device, rows, columns) if piece is not None]
        mask = reduce(torch.logical_and, pieces) if pieces else None
        if self.front is not None or (mask is not None and geometry.front):
            mask = self.put_front(mask, geometry.front, own, device)
        if self.dense is not None:
            dense = self.over_all(self.dense, geometry, rows, columns)
            mask = dense if mask is None else mask & dense
        return mask

    def over_own(
        self, geometry: ScoreShape, device: torch.device | str | None, rows: tuple[int, int], columns: tuple[int, int]
    ) -> tuple[Tensor | None, ...]:
        seen = None if self.keys is None else self.keys[:, None, None, columns[0] : columns[1]]
        same = None
        if self.packed is not None:
            queries, keys = self.packed.segments(geometry)
            same = (queries[:, slice(*rows), None] == keys[:, None, slice(*columns)])[:, None]
        return seen, same, self.by_distance(geometry, device, rows, columns)

    def by_distance(
        self, geometry: ScoreShape, device: torch.device | str | None, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Tensor | None:
        past, ahead = self.limits(geometry)
        if past is None and ahead is None and not self.strict:
            return None
        query = torch.arange(geometry.first + rows[0], geometry.first + rows[1], device=device)[:, None]
        key = torch.arange(columns[0], columns[1], device=device)
        mask = None
        if ahead is not None:
            mask = (key <= query if self.causal else key - query <= ahead)[None, None]
            if self.causal and isinstance(self.prefix, Tensor):
                mask = mask | (key < self.prefix.reshape(-1, 1, 1, 1))
            elif self.causal and self.prefix is not None:
                mask = mask | (key < self.prefix)
        if past is not None:
            near = (query - key <= past)[None, None]
            mask = near if mask is None else mask & near
        if self.strict:
            others = (query != key)[None, None]
            mask = others if mask is None else mask & others
        return mask

    def put_front(
        self, mask: Bool[Tensor, '#b #h #i o'] | None, front: int, own: int, device: torch.device | str | None
    ) -> Bool[Tensor, '#b #h i j']:
        """Columns in front of it: open, but for those that ``self.front`` closes."""
        if self.front is None:
            if mask is None:
                return torch.ones(1, 1, 1, front + own, dtype=torch.bool, device=device)
            return F.pad(mask, (front, 0), value=True)
        opened = F.pad(self.front, (front - self.front.shape[-1], 0), value=True)[:, None, None, :]
        if mask is None:
            return F.pad(opened, (0, own), value=True)
        rows, queries = max(opened.shape[0], mask.shape[0]), mask.shape[2]
        return torch.cat((opened.expand(rows, 1, queries, front), mask.expand(rows, -1, -1, -1)), dim=-1)

    @staticmethod
    def over_all(
        dense: Bool[Tensor, '... #r c'], geometry: ScoreShape, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Bool[Tensor, '#b #h i j']:
        """Some rows and columns of the user's mask, whose missing columns on the left are open."""
        dense = dense[(None,) * (4 - dense.ndim)]
        dense = over_columns(dense, geometry.own, geometry.keys)
        if dense.shape[-2] != 1 and rows != (0, dense.shape[-2]):
            dense = dense[..., rows[0] : rows[1], :]
        if columns == (0, geometry.own):
            return dense
        own = dense[..., geometry.front + columns[0] : geometry.front + columns[1]]
        return torch.cat((dense[..., : geometry.front], own), dim=-1) if geometry.front else own

    def seen(self, geometry: ScoreShape, device: torch.device | str | None = None) -> Int[Tensor, '#b #h #i 1']:
        """How many keys each query sees, those in front too. Rendered only where no arithmetic tells."""
        key = ('seen', geometry.queries, geometry.keys, geometry.front)
        cached: Tensor | None = recall(self.memo, key)
        return remember(self.memo, key, self._counted(geometry, self.device_or(device))) if cached is None else cached

    def _counted(self, geometry: ScoreShape, device: torch.device | str | None) -> Int[Tensor, '#b #h #i 1']:
        query = torch.arange(geometry.first, geometry.first + geometry.queries, device=device)
        if not self.per_token and not self.strict:
            past, ahead = self.limits(geometry)
            last = torch.full_like(query, geometry.own) if ahead is None else (query + ahead + 1).clamp(max=geometry.own)
            first = 0 if past is None else (query - past).clamp(min=0)
            return ((last - first).clamp(min=0) + geometry.front)[None, None, :, None]
        if self.keys is not None and self.only_padding and geometry.first >= 0:
            keys = self.keys.cumsum(dim=-1)
            keys = keys[:, geometry.first :] if self.limits_future(geometry) else keys[:, -1:]
            return (keys + geometry.front)[:, None, :, None]
        mask = self.rendered(geometry, device)
        if mask is None:
            return torch.full((1, 1, 1, 1), geometry.keys, device=device)
        return mask.sum(dim=-1, keepdim=True)

    def open_rows(self, geometry: ScoreShape, device: torch.device | str | None = None) -> Bool[Tensor, '#b #h i 1'] | None:
        """Which queries have something to look at; None where all have, as the mask's kind alone tells."""
        if not self.may_hide_all(geometry):
            return None
        key = ('open', geometry.queries, geometry.keys, geometry.front)
        cached: Tensor | None = recall(self.memo, key)
        if (
            cached is None
            and self.keys is not None
            and self.causal
            and self.only_padding
            and geometry.front == 0 <= geometry.first
        ):
            # something has come up to there
            cached = remember(self.memo, key, (self.keys.cumsum(dim=-1) > 0)[:, None, geometry.first :, None])
        if cached is None:
            mask = self.rendered(geometry, device)
            if mask is None:
                mask = torch.full((1, 1, 1, geometry.keys), True, device=self.device_or(device))
            cached = remember(self.memo, key, mask.any(dim=-1, keepdim=True))
        return cached
