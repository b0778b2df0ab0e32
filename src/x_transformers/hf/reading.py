"""Reading of tensors into their final memory, a few rows at a time where a map allows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from x_transformers.hf.family import KeyRule
from x_transformers.hf.maps import SAME, Map, RowOrder
from x_transformers.saving.tensors import TensorPlace, TensorSource, Weights, rows_of_place
from x_transformers.tensor_types import Shaped


def sources_of(entry: KeyRule, weights: Weights) -> dict[str, TensorSource]:
    """What makes each of a rule's tensors."""
    if entry.map is SAME:
        return {ours: weights.stored(theirs) for theirs, ours in zip(entry.theirs, entry.ours, strict=True)}
    place = weights.places[entry.theirs[0]]
    if entry.map.rows == 'below':
        return {entry.ours[0]: TensorSource(place.dtype, partial(rows_below, entry.theirs, weights))}
    if entry.map.rows is not None and len(entry.theirs) == 1:
        read = READ[entry.map.rows]
        return {
            name: TensorSource(place.dtype, partial(read, place, entry.map, number)) for number, name in enumerate(entry.ours)
        }
    return held_sources(entry, weights, place.dtype)


def held_sources(entry: KeyRule, weights: Weights, dtype: torch.dtype) -> dict[str, TensorSource]:
    """Tensors are read whole; several that are made of one are kept until all have been taken."""
    made: dict[str, Tensor] = {}

    def into(name: str) -> Callable[[Tensor], None]:
        def written(out: Shaped[Tensor, '...']) -> None:
            if name not in made:
                made.update(zip(entry.ours, entry.map.into(tuple(weights[t] for t in entry.theirs)), strict=True))
            out.copy_(made.pop(name))

        return written

    return {name: TensorSource(dtype, into(name)) for name in entry.ours}


def rows_below(theirs: tuple[str, ...], weights: Weights, out: Shaped[Tensor, 'n ...']) -> None:
    whole = out.view(-1, *weights.shape(theirs[0])[1:])
    for name, part in zip(theirs, whole.chunk(len(theirs)), strict=True):
        weights.stored(name).into(part)


# ``number``: which of the tensors that the map makes goes into ``out``


def rows_stay(place: TensorPlace, map: Map, number: int, out: Shaped[Tensor, 'n ...']) -> None:
    for first, rows in rows_of_place(place):
        out[first : first + rows.shape[0]].copy_(map.into((rows,))[number])


def rows_turn(place: TensorPlace, map: Map, number: int, out: Shaped[Tensor, 'c n']) -> None:
    for first, rows in rows_of_place(place):
        out[:, first : first + rows.shape[0]].copy_(map.into((rows,))[number])


def rows_move(place: TensorPlace, map: Map, number: int, out: Shaped[Tensor, 'n ...']) -> None:
    # the map is asked where rows go by giving it their numbers
    taken = map.into((torch.arange(place.shape[0]),))[number]
    places = torch.full((place.shape[0],), -1)
    places[taken] = torch.arange(taken.shape[0])
    for first, rows in rows_of_place(place):
        to = places[first : first + rows.shape[0]]
        if bool((to < 0).any()):
            rows, to = rows[to >= 0], to[to >= 0]
        out.index_copy_(0, to.to(out.device), rows.to(out))


READ: dict[RowOrder, Callable[[TensorPlace, Map, int, Tensor], None]] = {
    'stay': rows_stay,
    'turn': rows_turn,
    'move': rows_move,
}
