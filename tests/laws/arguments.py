"""What a combination gives at the call, and how each argument is cut to some rows and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.call import OF_MODELS


@dataclass(frozen=True)
class Along:
    """An argument that is no plain ``(rows, …)`` tensor: where its rows lie, and its tokens; lists are cut entry by entry."""

    value: Any
    rows: int | None = 0
    tokens: tuple[int, ...] = ()
    like_x: bool = False  # belongs to the tokens of x: where x is new tokens only, it is theirs only
    front: int = 0  # so many entries in front of the tokens' are never cut off

    def part(self, rows: slice | Tensor, start: int, stop: int) -> Any:
        return self._cut(self.value, rows, start, stop)

    def _cut(self, value: Any, rows: slice | Tensor, start: int, stop: int) -> Any:
        if isinstance(value, dict):
            return {name: self._cut(each, rows, start, stop) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(each, rows, start, stop) for each in value)
        if isinstance(value, KVCache):
            return value.reorder(torch.arange(next(tape.batch for layer in value for tape in layer.tapes.values()))[rows])
        if self.rows is not None:
            value = value[(slice(None),) * self.rows + (rows,)]
        for axis in self.tokens:
            cut = value.narrow(axis, self.front + start, stop - start)
            value = torch.cat((value.narrow(axis, 0, self.front), cut), dim=axis) if self.front else cut
        return value


@dataclass(frozen=True)
class Draw:
    """What an argument is made from: the size of the batch, a seeded generator, and the flags of the combination."""

    rows: int
    generator: torch.Generator
    dtype: torch.dtype
    flags: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] = field(default_factory=dict)
    attentions: int = 0  # executed self attentions
    mems: int = 0  # how long memories are

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def chance(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.7


class Arguments:
    """The keywords of one call, over all rows and tokens."""

    def __init__(self, given: dict[str, Tensor | Along], length: int) -> None:
        self.given = {name: value if isinstance(value, Along) else Along(value) for name, value in given.items()}
        for name, along in self.given.items():
            self._as_declared(name, along)
        self.length = length

    @staticmethod
    def _as_declared(name: str, along: Along) -> None:
        """Rows and tokens are cut where the argument's declaration says that they are."""
        declared, value = OF_MODELS.get(name), along.value
        if declared is None or not isinstance(value, Tensor) or not declared.form(value):
            return
        assert along.rows in (None, declared.axis(value, 'b')), f'{name}: its rows lie elsewhere'
        axes = {axis % value.ndim for axis in along.tokens}
        known = {declared.axis(value, letter) for letter in 'nij'} - {None}
        assert axes <= known, f'{name}: its tokens lie elsewhere'

    def part(
        self, rows: slice | Tensor = slice(None), start: int = 0, stop: int | None = None, *, new: int | None = None
    ) -> dict[str, Any]:
        """As for these rows alone, and for the tokens from ``start`` to ``stop``, of which x has those from ``new``."""
        stop, new = self.length if stop is None else stop, start if new is None else new
        return {name: value.part(rows, new if value.like_x else start, stop) for name, value in self.given.items()}

    def without(self, names: Iterable[str]) -> Arguments:
        return Arguments({name: value for name, value in self.given.items() if name not in set(names)}, self.length)
