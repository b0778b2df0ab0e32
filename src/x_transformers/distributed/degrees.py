"""The number of processes along each axis of the grid, and validation of a grid."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from x_transformers.training.errors import TrainingError

Shard = Literal['none', 'full', 'hybrid']


class MeshError(TrainingError):
    """The processes do not form the requested grid."""


@dataclass(frozen=True)
class Degrees:
    """The number of processes along each axis of the grid. One axis may be -1: all that are left.

    Processes along ``replicate`` and ``shard`` read different data: copies, or parts of each parameter.
    ``refusals.py`` says where ``tensor``, ``context`` and ``pipeline`` must be 1.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @classmethod
    def of(cls, shard: Shard, *, tensor: int = 1, context: int = 1, pipeline: int = 1, per_node: int | None = None) -> Degrees:
        """The grid of ``--shard``: copies, parts over all processes, or parts within a node and copies between nodes."""
        along = {'tensor': tensor, 'context': context, 'pipeline': pipeline}
        if shard == 'none':
            return cls(replicate=-1, **along)
        if shard == 'full':
            return cls(shard=-1, **along)
        within = int(os.environ.get('LOCAL_WORLD_SIZE', '1')) if per_node is None else per_node
        return cls(replicate=-1, shard=max(within // (tensor * context), 1), **along)

    def resolved(self, world_size: int) -> Degrees:
        """The degrees with -1 replaced.

        Errors: ``MeshError`` if they do not fit the number of processes.
        """
        values = {name: getattr(self, name) for name in AXES}
        wrong = [
            f'{name} must be a positive number, or -1, got {value}.' for name, value in values.items() if value < 1 != -value
        ]
        rest = [name for name, value in values.items() if value == -1]
        if len(rest) > 1:
            wrong.append(f'one axis alone may take the rest (-1), got {" and ".join(rest)}.')
        if wrong:
            raise MeshError(' '.join(wrong))
        known = 1
        for value in values.values():
            known *= max(value, 1)
        grid = ' times '.join(f'{name} {value}' for name, value in values.items() if value > 1)
        if rest and world_size % known:
            raise MeshError(f'the number of processes must be a multiple of {known} ({grid}), got {world_size}. Start others.')
        if not rest and world_size != known:
            raise MeshError(f'the number of processes must be {known} ({grid or "one"}), got {world_size}. Start as many.')
        return Degrees(**{name: world_size // known if value == -1 else value for name, value in values.items()})


AXES = ('replicate', 'shard', 'tensor', 'context', 'pipeline')
