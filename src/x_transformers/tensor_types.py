"""Shapes in signatures: ``Float[Tensor, 'b n d']``.

A type checker reads these as plain ``Tensor`` (they are ``Annotated``). At run time the annotation keeps the kind of number and
the axes, so that the test suite can check every call (see ``tests/shapes.py``); an ordinary import pays nothing for it.

Axes, everywhere: b batch, n sequence, d features, h heads, i and j query and key positions, s streams, l layers. ``#h`` may
be 1 (it broadcasts), ``...`` stands for any number of axes, a name in parentheses is a product such as ``(b s)``. ``Shaped`` is
for functions that take numbers of every kind. ``Tensors`` and ``StateDict`` hold tensors whose kinds and shapes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Complex
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as Shaped
else:

    @dataclass(frozen=True)
    class Shape:
        """What an annotation says: the kind of number and the names of the axes."""

        kind: str
        axes: str

    class _Kind:
        kind: str

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            base, axes = item
            return Annotated[base, Shape(cls.kind, axes)]

    class Float(_Kind):
        kind = 'float'

    class Int(_Kind):
        kind = 'int'

    class Bool(_Kind):
        kind = 'bool'

    class Complex(_Kind):
        kind = 'complex'

    class Shaped(_Kind):
        kind = 'any'


Tensors = tuple[Shaped[Tensor, '...'], ...]
StateDict = Mapping[str, Shaped[Tensor, '...']]

__all__ = ['Bool', 'Complex', 'Float', 'Int', 'Shaped', 'StateDict', 'Tensors']
