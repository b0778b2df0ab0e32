"""``python -m tests.laws.sharded [decoder+streams …] [--layers --layers+again --root]``: FSDP2 over two processes against one.

Every layer is a unit and the model is the root, or the model alone is one.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.laws.combination import Combination
from tests.two_processes import WORLD, check_equal, command


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh('cpu', (WORLD,))


def shard(model: Any, units: str) -> None:
    # a parameter without an axis cannot be cut: every rank keeps it, and averages its gradient
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    if units == 'layers':
        for layer in model.attn_layers.layers:
            fully_shard(layer, mesh=mesh(), ignored_params=scalars)
    fully_shard(model, mesh=mesh(), ignored_params=scalars)
    for parameter in scalars:
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(WORLD)))


def attempt(name: str) -> None:
    case, mode = name.split()
    units, _, again = mode.partition('+')
    stack = {'gradient_checkpointing': True} if again else None
    check_equal(Combination.parse(case), partial(shard, units=units), stack=stack)


if __name__ == '__main__':
    command(attempt, ['layers', 'root'])
