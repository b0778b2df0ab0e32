"""``python -m tests.distributed.equality [decoder+streams …] [--copies --shards …]``: two processes against one."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.laws.combination import Combination
from tests.two_processes import check_equal, command
from x_transformers.distributed.mesh import Degrees, World, start
from x_transformers.distributed.parallelize import parallelize

# (degrees, keywords of parallelize)
MODES: dict[str, tuple[Degrees, dict[str, Any]]] = {
    'copies': (Degrees(replicate=2), {}),
    'copies+full': (Degrees(replicate=2), {'checkpoint': 'full'}),
    'shards': (Degrees(shard=2), {'shard': 'full'}),
    'shards+full': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 'full'}),
    'shards+every': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 2}),
    'shards+kept': (Degrees(shard=2), {'shard': 'full', 'reshard': False}),
    'hybrid': (Degrees(replicate=2, shard=1), {'shard': 'hybrid'}),
}


@cache
def world_of(degrees: Degrees) -> World:
    return start(degrees, 'cpu')


def attempt(name: str) -> None:
    case, mode = name.split()
    degrees, how = MODES[mode]
    check_equal(Combination.parse(case), lambda model: parallelize(model, world_of(degrees), **how))


if __name__ == '__main__':
    command(attempt, list(MODES))
