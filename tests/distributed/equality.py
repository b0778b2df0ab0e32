"""``python -m tests.distributed.equality [decoder+streams …] [--copies --shards …]``: several processes against one.

A flag that the table refuses for a mode must be refused by name; every other one must give the numbers of one process.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor import DTensor

from tests.laws.combination import Combination
from tests.two_processes import check_equal, command
from x_transformers.distributed.mesh import Degrees, MeshError, World, start
from x_transformers.distributed.parallelize import parallelize
from x_transformers.distributed.refusals import refusals

# (degrees, keywords of parallelize)
MODES: dict[str, tuple[Degrees, dict[str, Any]]] = {
    'copies': (Degrees(replicate=2), {}),
    'copies+full': (Degrees(replicate=2), {'checkpoint': 'full'}),
    'shards': (Degrees(shard=2), {'shard': 'full'}),
    'shards+full': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 'full'}),
    'shards+every': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 2}),
    'shards+kept': (Degrees(shard=2), {'shard': 'full', 'reshard': False}),
    'hybrid': (Degrees(replicate=2, shard=1), {'shard': 'hybrid'}),
    'tensor': (Degrees(tensor=2), {}),
    'tensor+full': (Degrees(tensor=2), {'checkpoint': 'full'}),
}
# the same for four processes
OF_FOUR: dict[str, tuple[Degrees, dict[str, Any]]] = {
    'shards+tensor': (Degrees(shard=2, tensor=2), {'shard': 'full'}),
    'shards+tensor+full': (Degrees(shard=2, tensor=2), {'shard': 'full', 'checkpoint': 'full'}),
    'hybrid+tensor': (Degrees(replicate=2, tensor=2), {'shard': 'hybrid'}),
    'hybrid+shards': (Degrees(replicate=2, shard=2), {'shard': 'hybrid'}),
}


@cache
def world_of(degrees: Degrees) -> World:
    return start(degrees, 'cpu')


def attempt(name: str) -> None:
    case, mode = name.split()
    degrees, how = {**MODES, **OF_FOUR}[mode]
    combination = Combination.parse(case)

    def spread(model: nn.Module) -> None:
        parallelize(model, world_of(degrees), **how)
        if degrees.tensor > 1:
            meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
            assert any('tensor' in (mesh.mesh_dim_names or ()) for mesh in meshes), 'nothing is cut'

    if is_refused(combination, degrees):
        with pytest.raises(MeshError, match='must be left as it is'):
            spread(combination.build())
    else:
        world = world_of(degrees)
        check_equal(combination, spread, (world.data_rank, world.data_size))


def is_refused(case: Combination, degrees: Degrees) -> bool:
    kinds = {name for name in ('tensor', 'context', 'pipeline') if getattr(degrees, name) > 1}
    return bool(kinds) and any(refusals(case.build(), kinds))


if __name__ == '__main__':
    four = bool({text.removeprefix('--') for text in sys.argv} & OF_FOUR.keys())
    command(attempt, list(OF_FOUR if four else MODES), 4 if four else 2)
