"""Conversion of flag values to plain data for JSON, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# the key of a value for each layer
PER_LAYER = 'per_layer'
# of a value that is no plain data: what a file holds of it, None: nothing
DescribeModule = Callable[[Any, str, list[str]], dict[str, Any] | None]


@dataclass(frozen=True)
class PerLayer:
    """What ``per_layer`` makes: ``values`` for the layers of a kind, which repeat, or a ``function`` of the layer's index."""

    values: tuple[Any, ...] = ()
    function: Callable[[int], Any] | None = None


def nothing(value: Any, path: str, wrong: list[str]) -> dict[str, Any] | None:
    return None


def plain(value: Any, path: str, wrong: list[str], describe: DescribeModule = nothing) -> Any:
    """What a file holds of a value. ``wrong`` gets a sentence, beginning with ``path``, for each part that it cannot hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(entry, path, wrong, describe) for entry in value]
    if isinstance(value, PerLayer) and value.function is None:
        return {PER_LAYER: plain(value.values, path, wrong, describe)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry, f'{path}[{name!r}]', wrong, describe) for name, entry in value.items()}
    described = describe(value, path, wrong)
    if described is None:
        what = getattr(value, '__name__', type(value).__name__)
        wrong.append(
            f'{path} must be plain data to be saved in a file, got {what}. Save the state_dict instead, or give a name.'
        )
    return described


def value_from_plain(held: Any, build: Callable[[Mapping[str, Any]], Any] | None = None) -> Any:
    """The value of which a file holds ``held``. ``build``: makes a model of a description, which has a class."""
    if isinstance(held, Mapping):
        if build is not None and 'class' in held:
            return build(held)
        if set(held) == {PER_LAYER}:
            return PerLayer(values=tuple(value_from_plain(held[PER_LAYER], build)))
        return {name: value_from_plain(entry, build) for name, entry in held.items()}
    if isinstance(held, list):
        return tuple(value_from_plain(entry, build) for entry in held)
    return held
