"""Values of keywords that differ from layer to layer.

In a stack, a keyword of its parts (``attn_``, ``cross_attn_``, ``ff_``) may be a tuple with one value for each layer of that
kind, or a function of the layer's index. A keyword whose own value may be a tuple or a function takes ``per_layer`` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, get_origin

from torch import nn

from x_transformers.flags.base import FlagError, kinds_of, one_kind, shown, tidied
from x_transformers.flags.plain import PerLayer

T = TypeVar('T')


Each: TypeAlias = T | Sequence[T] | Callable[[int], T] | PerLayer
"""What a keyword takes that may differ from layer to layer."""


def per_layer(values: Sequence[Any] | Callable[[int], Any]) -> PerLayer:
    """A keyword's value for each layer of its kind, counted from 0.

    ``values``: a sequence, which repeats if it is shorter than there are layers, or a function of the layer's index. Needed
    only where the keyword's own value may be a tuple or a function; elsewhere a tuple or a function says the same.
    """
    if callable(values) and not isinstance(values, Sequence):
        return PerLayer(function=values)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise FlagError(f'`per_layer` must be given a sequence or a function of the layer index, got {shown(values)}.')
    return PerLayer(values=tuple(values))


def layer_schedule(
    start: float, end: float, depth: int, schedule: str | Callable[[float, float, float], float] = 'cosine'
) -> tuple[float, ...]:
    """One number for each of ``depth`` layers, from ``start`` to ``end``.

    ``schedule``: 'linear', 'cosine', or a function of (start, end, t), with t from 0 in the first layer to 1 in the last.
    See https://arxiv.org/abs/2606.23670 for feed-forwards that taper: ``ff_mult=layer_schedule(4, 1, depth)``.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 2:
        raise FlagError(f'`depth` must be a whole number from 2, got {shown(depth)}. Leave out the schedule for one layer.')
    known: dict[str, Callable[[float, float, float], float]] = {
        'linear': lambda first, last, t: first + (last - first) * t,
        'cosine': lambda first, last, t: first + (last - first) * 0.5 * (1 - math.cos(math.pi * t)),
    }
    value = known.get(schedule) if isinstance(schedule, str) else schedule
    if value is None or not callable(value):
        raise FlagError(f"`schedule` must be 'linear', 'cosine' or a function of (start, end, t), got {shown(schedule)}.")
    return tuple(float(value(start, end, layer / (depth - 1))) for layer in range(depth))


def takes(hint: Any) -> tuple[bool, bool]:
    """Whether a keyword's own value may be (a tuple, a function)."""
    kinds = [get_origin(kind) or kind for kind in kinds_of(hint)]
    anything = any(kind is Any for kind in kinds)
    called = any(kind is Callable or (isinstance(kind, type) and issubclass(kind, nn.Module)) for kind in kinds)
    return anything or tuple in kinds, anything or called


def as_per_layer(value: Any, hint: Any) -> PerLayer | None:
    """``value`` as one value per layer, if that is what it says; None: it is one value for all layers."""
    if isinstance(value, PerLayer):
        return value
    own_tuple, own_function = takes(hint)
    if isinstance(value, (tuple, list)):
        return None if own_tuple else PerLayer(values=tuple(value))
    if callable(value):
        return None if own_function else PerLayer(function=value)
    return None


def spread(per_layer: PerLayer, layers: int, hint: Any, *, name: str, kind: str) -> tuple[tuple[Any, ...], list[str]]:
    """(the value of each of ``layers`` layers, what is wrong). ``name``: the keyword; ``kind``: words for the kind of layer."""
    if not layers:
        return (), [f'`{name}` must be one value, as there is no {kind} layer, got one for each. Leave it out.']
    if per_layer.function is None:
        count = len(per_layer.values)
        if not count:
            return (), [f'`{name}` must hold a value for each {kind} layer, got an empty tuple. Give one value or more.']
        if count > layers:
            return (), [
                f'`{name}` must hold at most one value for each of the {layers} {kind} layers, got {count}. Give fewer.'
            ]
        values: list[Any] = [per_layer.values[layer % count] for layer in range(layers)]
    else:
        values = []
        for layer in range(layers):
            try:
                values.append(per_layer.function(layer))
            except Exception as error:
                return (), [
                    f'`{name}` must give a value for each of the {layers} {kind} layers, got '
                    f'{type(error).__name__}: {error} for layer {layer}. Mend the function, or give a tuple.'
                ]
    values = [tidied(value, hint) for value in values]
    kinds = [one_kind(each) for each in kinds_of(hint)]
    for layer, value in enumerate(values):
        if not any(fits(value) for _, fits in kinds):
            wanted = ' or '.join(words for words, _ in kinds)
            return (), [
                f'`{name}` must be {wanted} in every layer, got {shown(value)} (of type {type(value).__name__}) in '
                f'{kind} layer {layer}.'
            ]
    return tuple(values), []


__all__ = ['Each', 'PerLayer', 'as_per_layer', 'layer_schedule', 'per_layer', 'spread', 'takes']
