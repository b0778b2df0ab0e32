"""``python -m tests.distributed.equality [decoder+streams …] [--copies --shards …]``: two processes against one.

In double precision the loss and every gradient are those of one process that reads both batches.
"""

from __future__ import annotations

import copy
import os
import random
import socket
import sys
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.laws.combination import Combination, rotated, tokens
from tests.laws.laws import ROWS
from x_transformers.distributed.mesh import Degrees, World, start, stop
from x_transformers.distributed.parallelize import parallelize
from x_transformers.randomness import decide_alike

WORLD = 2
CLOSE = 1e-8

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


def loss_of(case: Combination, model: nn.Module, rank: int) -> Tensor:
    """Of the batch that this rank reads; ``rank`` also seeds what is drawn for it."""
    torch.manual_seed(rank)
    decide_alike(7)
    out = case.call(model, tokens(ROWS, seed=10 + rank), case.inputs(ROWS, seed=20 + rank).part())
    return (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_equal(case: Combination, world: World, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = case.build().train()
    alone = copy.deepcopy(model)
    losses = [loss_of(case, alone, each) for each in range(WORLD)]
    (sum(losses) / WORLD).backward()  # type: ignore[union-attr]
    parallelize(model, world, **how)
    loss = loss_of(case, model, world.rank)
    loss.backward()
    gap = (loss - losses[world.rank]).abs().item()
    if not gap <= CLOSE * max(1.0, abs(losses[world.rank].item())):
        raise AssertionError(f'loss differs by {gap:.2g}')
    names = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        want = names[name.replace('_checkpoint_wrapped_module.', '')]
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        got = torch.zeros_like(want) if parameter.grad is None else whole(parameter.grad)
        gap = (got - expected).abs().max().item() if want.numel() else 0.0
        if not gap <= CLOSE * max(1.0, expected.abs().max().item()):
            raise AssertionError(f'gradient of {name} differs by {gap:.2g}')


def worker(rank: int, port: int, cases: list[str], modes: list[str], path: str) -> None:
    os.environ.update(
        MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD)
    )
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    worlds = {degrees: start(degrees, 'cpu') for degrees in dict.fromkeys(MODES[mode][0] for mode in modes)}
    failed, done = [], 0
    for text in cases:
        for mode in modes:
            degrees, how = MODES[mode]
            try:
                random.seed(0)
                check_equal(Combination.parse(text), worlds[degrees], how)
                problem = ''
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                problem = f'{text} {mode}: {type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})'
            problems: list[Any] = [None] * WORLD
            dist.all_gather_object(problems, problem)
            failed += [each for each in problems if each][:1]
            done += 1
    decide_alike(None)
    if rank == 0:
        with open(path, 'w', encoding='utf-8') as file:
            file.write('\n'.join([str(done), *failed]))
    stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return int(probe.getsockname()[1])


def run(cases: list[str], modes: list[str], path: str) -> tuple[int, list[str]]:
    """(how many were tried, what failed)."""
    mp.spawn(worker, (free_port(), cases, modes, path), nprocs=WORLD)  # type: ignore[no-untyped-call]
    with open(path, encoding='utf-8') as file:
        done, *failed = file.read().split('\n')
    return int(done), failed


if __name__ == '__main__':
    asked = [text for text in sys.argv[1:] if not text.startswith('--')]
    modes = [text.removeprefix('--') for text in sys.argv[1:] if text.startswith('--')] or list(MODES)
    done, failed = run(asked or [str(case) for case in rotated()], modes, f'/tmp/equality-{os.getpid()}')
    print('\n'.join([*failed, f'{done} tried, {len(failed)} failed']))
