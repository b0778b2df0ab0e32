"""``python -m tests.laws.sharded [decoder+streams …] [--layers --layers+again --root]``: FSDP2 over two processes against one.

Every layer is a unit and the model is the root, or the model alone is one. In double precision loss and
gradients are those of one process that reads both batches.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.laws.combination import Combination, rotated, tokens
from tests.laws.laws import ROWS
from x_transformers.randomness import decide_alike

WORLD = 2
CLOSE = 1e-8


def loss_of(case: Combination, model: nn.Module, rank: int) -> Tensor:
    """Of the batch that this rank reads; ``rank`` also seeds what is drawn for it."""
    torch.manual_seed(rank)
    decide_alike(7)
    out = case.call(model, tokens(ROWS, seed=10 + rank), case.inputs(ROWS, seed=20 + rank).part())
    return (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum()


def shard(model: Any, mesh: Any, mode: str) -> None:
    # a parameter without an axis cannot be cut: every rank keeps it, and averages its gradient
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    if mode == 'layers':
        for layer in model.attn_layers.layers:
            fully_shard(layer, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for parameter in scalars:
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(WORLD)))


def check(case: Combination, rank: int, mesh: Any, mode: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model: Any = case.build(stack={'gradient_checkpointing': True} if checkpointing else None).train()
    alone = copy.deepcopy(model)
    losses = [loss_of(case, alone, each) for each in range(WORLD)]
    (sum(losses) / WORLD).backward()  # type: ignore[union-attr]
    shard(model, mesh, mode)
    loss = loss_of(case, model, rank)
    loss.backward()
    gap = (loss - losses[rank]).abs().item()
    if gap > CLOSE * max(1.0, abs(losses[rank].item())):
        raise AssertionError(f'loss differs by {gap:.2g}')
    for (name, parameter), (_, want) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        got = torch.zeros_like(want) if grad is None else grad
        gap = (got - expected).abs().max().item() if want.numel() else 0.0
        if gap > CLOSE * max(1.0, expected.abs().max().item()):
            raise AssertionError(f'gradient of {name} differs by {gap:.2g}')


def worker(rank: int, port: int, cases: list[str], modes: list[str], path: str) -> None:
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    dist.init_process_group('gloo', rank=rank, world_size=WORLD)
    mesh = init_device_mesh('cpu', (WORLD,))
    failed, done = [], 0
    for text in cases:
        for mode in modes:
            name, _, again = mode.partition('+')
            try:
                random.seed(0)
                check(Combination.parse(text), rank, mesh, name, bool(again))
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
    dist.destroy_process_group()


def run(cases: list[str], modes: list[str], path: str) -> tuple[int, list[str]]:
    """(how many were tried, what failed)."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, cases, modes, path), nprocs=WORLD)  # type: ignore[no-untyped-call]
    with open(path, encoding='utf-8') as file:
        done, *failed = file.read().split('\n')
    return int(done), failed


if __name__ == '__main__':
    cases = [text for text in sys.argv[1:] if not text.startswith('--')]
    modes = [text.removeprefix('--') for text in sys.argv[1:] if text.startswith('--')] or ['layers', 'root']
    cases = cases or [str(case) for case in rotated()]
    done, failed = run(cases, modes, f'/tmp/sharded-{os.getpid()}')
    print('\n'.join([*failed, f'{done} tried, {len(failed)} failed']))
