"""Maps of tensors between the two formats, each with its inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from x_transformers.flags.base import FlagError
from x_transformers.tensor_types import Shaped, Tensors

# of each tensor of a rule alone
OneTensor = Callable[[Shaped[Tensor, '...']], Shaped[Tensor, '...']]
RowOrder = Literal['stay', 'turn', 'move', 'below']


@dataclass(frozen=True)
class Map:
    """From their tensors to ours, and back.

    ``rows``: what becomes of a row of theirs (of the first axis), so that a large tensor need not be held whole: 'stay': the
    row of the same number; 'turn': the column of that number; 'move': the same row, somewhere else; 'below': it lies, in the
    order of theirs, below those of the tensors before. None: something else.
    """

    into: Callable[[Tensors], Tensors]
    back: Callable[[Tensors], Tensors]
    rows: RowOrder | None = None

    def then(self, other: Map) -> Map:
        if self is SAME:
            return other
        rows = self.rows if other is SAME or self.rows == other.rows != 'turn' else None
        rows = other.rows if self.rows == 'stay' and other.rows == 'turn' else rows
        return Map(lambda t: other.into(self.into(t)), lambda t: self.back(other.back(t)), rows)


def together(tensors: Sequence[Shaped[Tensor, '...']], dim: int = 0) -> Shaped[Tensor, '...']:
    """``torch.cat``; with tensors without memory, of which shapes are asked, torch would load its compiler."""
    if not tensors[0].is_meta:
        return torch.cat(tuple(tensors), dim=dim)
    first = tensors[0]
    shape = [sum(t.shape[dim] for t in tensors) if axis == dim else size for axis, size in enumerate(first.shape)]
    if any(t.shape[:dim] + t.shape[dim + 1 :] != first.shape[:dim] + first.shape[dim + 1 :] for t in tensors):
        raise ValueError(
            f'tensors must agree in all axes but {dim} to be joined, got shapes '
            f'{", ".join(str(tuple(t.shape)) for t in tensors)}. Join others.'
        )
    return first.new_empty(shape)


def each(into: OneTensor, back: OneTensor, rows: RowOrder | None = None) -> Map:
    """The same for every tensor of a rule."""
    return Map(lambda t: tuple(into(one) for one in t), lambda t: tuple(back(one) for one in t), rows)


def chain(*maps: Map) -> Map:
    return reduce(Map.then, maps, SAME)


def halves_swapped(t: Shaped[Tensor, 'n ...']) -> Shaped[Tensor, 'n ...']:
    half = t.shape[0] // 2
    return together((t[half:], t[:half]))


SAME = each(lambda t: t, lambda t: t, 'stay')
HALVES_SWAPPED = each(halves_swapped, halves_swapped, 'move')
TRANSPOSED = each(lambda t: t.t().contiguous(), lambda t: t.t().contiguous(), 'turn')


def one_of_equal(t: Tensors) -> Tensors:
    if any(not torch.equal(t[0], other) for other in t[1:]):
        raise FlagError(
            'to_hf: the norms of attention and feed-forward must be equal in each block, got different ones. '
            'The family has one for both. Set them to their mean, or use save_pretrained.'
        )
    return t[:1]


# one of theirs is two of ours
COPIED = Map(lambda t: t * 2, one_of_equal, 'stay')


def scaled(factor: float) -> Map:
    return each_number(lambda t: t * factor, lambda t: t / factor)


def shifted(by: float) -> Map:
    return each_number(lambda t: t + by, lambda t: t - by)


def each_number(into: OneTensor, back: OneTensor) -> Map:
    """Of each number alone; tensors without memory stay as they are, for arithmetic with them loads torch's compiler."""
    return each(lambda t: t if t.is_meta else into(t), lambda t: t if t.is_meta else back(t), 'stay')


def reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Map:
    return each(lambda t: t.reshape(ours), lambda t: t.reshape(theirs))


def paired(heads: int, dim_head: int, turned: int | None = None) -> Map:
    """Rows of heads whose k-th channels of both halves turn together, in the order in which neighbours do.

    ``turned``: how many channels of a head turn, the first ones.
    """
    turned = dim_head if turned is None else turned

    def rows(sizes: tuple[int, int]) -> OneTensor:
        def move(t: Shaped[Tensor, 'n ...']) -> Shaped[Tensor, 'n ...']:
            whole = t.reshape(heads, dim_head, *t.shape[1:])
            first = whole[:, :turned].reshape(heads, *sizes, *t.shape[1:]).transpose(1, 2)
            return together((first.reshape(heads, turned, *t.shape[1:]), whole[:, turned:]), dim=1).reshape(t.shape)

        return move

    return each(rows((2, turned // 2)), rows((turned // 2, 2)), 'move')


def regrouped_heads(heads: int, kv_heads: int, dim: int = 0) -> Map:
    """Query heads that share a key head lie together in theirs; in ours query head h has key head h mod kv_heads."""
    groups = heads // kv_heads
    if groups == 1 or kv_heads == 1:
        return SAME

    def move(first: int, second: int) -> OneTensor:
        def moved(t: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
            before, behind = t.shape[:dim], t.shape[dim + 1 :]
            parts = t.reshape(*before, first, second, t.shape[dim] // (first * second), *behind)
            return parts.transpose(dim, dim + 1).reshape(t.shape)

        return moved

    return each(move(kv_heads, groups), move(groups, kv_heads), 'stay' if dim else 'move')


def behind(count: int) -> Map:
    """Without so many rows in front, which are zeros on the way back."""
    if not count:
        return SAME

    def back(t: Shaped[Tensor, 'n ...']) -> Shaped[Tensor, 'm ...']:
        return together((t.new_zeros(count, *t.shape[1:]), t))

    return each(lambda t: t[count:], back, 'move')


def below(parts: int, experts: int | None = None) -> Map:
    """So many of theirs are one of ours, one below the other; with ``experts`` so many for each matrix of ours."""

    def into(t: Tensors) -> Tensors:
        whole = together(t)
        return (whole if experts is None else whole.reshape(experts, whole.shape[0] // experts, *whole.shape[1:]),)

    def back(t: Tensors) -> Tensors:
        whole = t[0] if experts is None else t[0].flatten(0, 1)
        return tuple(part.contiguous() for part in whole.chunk(parts * (experts or 1)))

    return Map(into, back, 'below')


JOINED = below(2)


def split(parts: int | tuple[int, ...], dim: int = 0) -> Map:
    """One of theirs is several of ours, so many of equal size, or of these sizes."""

    def into(t: Tensors) -> Tensors:
        found = t[0].chunk(parts, dim=dim) if isinstance(parts, int) else t[0].split(parts, dim=dim)
        return tuple(part.contiguous() for part in found)

    return Map(into, lambda t: (together(t, dim=dim),), 'stay' if dim else 'move')


def split_in_groups(kv_heads: int, groups: int, dim_head: int) -> Map:
    """Of each key head in theirs, so many query heads, the key and the value lie together."""

    def into(t: Tensors) -> Tensors:
        row = t[0].shape[1:]
        whole = t[0].reshape(kv_heads, groups + 2, dim_head, *row)
        parts = whole[:, :groups], whole[:, groups], whole[:, groups + 1]
        return tuple(part.reshape(-1, *row) for part in parts)

    def back(t: Tensors) -> Tensors:
        each_head = [part.reshape(kv_heads, -1, dim_head, *part.shape[1:]) for part in t]
        return (together(each_head, dim=1).reshape(-1, *t[0].shape[1:]),)

    return Map(into, back, 'move')


def apart(*maps: Map) -> Map:
    """A map of its own for each of our tensors."""
    kinds = {one.rows for one in maps if one is not SAME}
    return Map(
        lambda t: tuple(m.into((one,))[0] for m, one in zip(maps, t, strict=True)),
        lambda t: tuple(m.back((one,))[0] for m, one in zip(maps, t, strict=True)),
        kinds.pop() if len(kinds) == 1 else None,
    )
