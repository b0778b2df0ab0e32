"""What two processes do together, and a model spread over both against one process that reads both batches."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.laws.combination import Combination, rotated, tokens
from tests.laws.groups import ASIDE, GROUPS
from tests.laws.laws import ROWS
from x_transformers import AutoregressiveWrapper
from x_transformers.randomness import decide_alike

WORLD = 2
CLOSE = 1e-8

# raises if what the name stands for is wrong
Attempt = Callable[[str], None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return int(probe.getsockname()[1])


def join_as(rank: int, port: int, world: int = WORLD) -> None:
    """Be one of several processes, as torchrun says it."""
    os.environ.update(
        MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')


def worker(rank: int, world: int, port: int, attempt: Attempt, names: list[str], path: Path) -> None:
    join_as(rank, port, world)
    dist.init_process_group('gloo')
    failed, done = [], 0
    for name in names:
        try:
            random.seed(0)
            attempt(name)
            problem = ''
        except Exception:
            problem = f'{name}: {traceback.format_exc(limit=-3)[-1500:]}'
        decide_alike(None)
        problems: list[Any] = [None] * world
        dist.all_gather_object(problems, problem)
        failed += [each for each in problems if each][:1]
        done += 1
    if rank == 0:
        path.write_text(json.dumps((done, failed)), encoding='utf-8')
    dist.destroy_process_group()
    # groups that cycles hold end while the interpreter lives, which their threads may still ask for
    gc.collect()


def attempt_all(attempt: Attempt, names: list[str], world: int = WORLD) -> tuple[int, list[str]]:
    """(how many were tried, what failed). All processes try one name after the other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'found'
        mp.spawn(worker, (world, free_port(), attempt, names, path), nprocs=world)  # type: ignore[no-untyped-call]
        done, failed = json.loads(path.read_text(encoding='utf-8'))
    return done, failed


def every_flag() -> list[Combination]:
    return rotated((*GROUPS, *ASIDE))


def with_modes(cases: list[str], modes: list[str]) -> list[str]:
    return [f'{case} {mode}' for case in cases for mode in modes]


def command(attempt: Attempt, modes: list[str], world: int = WORLD) -> None:
    """``[decoder+streams …] [--mode …]``: without cases, every flag; without modes, ``modes``."""
    cases = [text for text in sys.argv[1:] if not text.startswith('--')] or [str(case) for case in every_flag()]
    asked = [text.removeprefix('--') for text in sys.argv[1:] if text.startswith('--')] or modes
    done, failed = attempt_all(attempt, with_modes(cases, asked), world)
    print('\n'.join([*failed, f'{done} tried, {len(failed)} failed']))


def batch_of(case: Combination, number: int) -> tuple[Tensor, dict[str, Any]]:
    """The tokens of the batch of this number, and what goes along with them. Packed sequences lie in one row."""
    rows = 1 if case.has('packed') else ROWS
    return tokens(rows, seed=10 + number), case.inputs(rows, seed=20 + number).part()


def loss_of(case: Combination, model: nn.Module, rank: int) -> Tensor:
    """Of the batch that this rank reads; ``rank`` also seeds what is drawn for it."""
    torch.manual_seed(rank)
    decide_alike(7)
    out = case.call(model, *batch_of(case, rank))
    return (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def objective_of(case: Combination, model: Callable[..., Tensor], rank: int) -> Tensor:
    """The same of predicting each next token."""
    torch.manual_seed(rank)
    decide_alike(7)
    x, given = batch_of(case, rank)
    return model(x, **given)


class Forward(Protocol):
    """A spread model that is called in another way, and gives a part of the loss, of which all make up the whole."""

    def __call__(self, x: Tensor, **given: Any) -> Tensor: ...
    def agreed(self, loss: Tensor) -> Tensor: ...


def check_equal(
    case: Combination,
    spread: Callable[[Any], Forward | None],
    reads: tuple[int, int] | None = None,
    *,
    objective: dict[str, Any] | None = None,
    **build: Any,
) -> None:
    """In double precision, loss and gradients of the model that ``spread`` spreads are those of one process.

    ``reads``: which batch this process reads, of how many; without it all read others. ``build`` goes to ``case.build``.
    ``objective``: the loss is that of predicting each next token, with these options.
    """
    rank, readers = reads or (dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model: Any = case.build(**build).train()
    if objective is not None:
        model = AutoregressiveWrapper(model, **objective)
    measure = loss_of if objective is None else objective_of
    alone = copy.deepcopy(model)
    losses = [measure(case, alone, each) for each in range(readers)]
    (sum(losses) / readers).backward()  # type: ignore[union-attr]
    forward = spread(model)
    loss = measure(case, forward or model, rank)
    loss.backward()
    loss = loss if forward is None else forward.agreed(loss)
    gap = (loss - losses[rank]).abs().item()
    if not gap <= CLOSE * max(1.0, abs(losses[rank].item())):
        raise AssertionError(f'loss differs by {gap:.2g}')
    parameters = {name.replace('_checkpoint_wrapped_module.', ''): parameter for name, parameter in model.named_parameters()}
    wanted = dict(alone.named_parameters())
    if parameters.keys() != wanted.keys():
        raise AssertionError(f'other parameters: {sorted(parameters.keys() ^ wanted.keys())}')
    for name, parameter in parameters.items():
        want = wanted[name]
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        got = torch.zeros_like(want) if parameter.grad is None else whole(parameter.grad)
        gap = (got - expected).abs().max().item() if want.numel() else 0.0
        if not gap <= CLOSE * max(1.0, expected.abs().max().item()):
            raise AssertionError(f'gradient of {name} differs by {gap:.2g}')
