"""Training, checkpoints and generation of two processes are those of one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.runs import CASES, run
from tests.two_processes import free_port, join_as
from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, is_lost, start, stop

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    assert run(list(CASES), tmp_path) == ''


def worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    engine = MeshEngine(start(Degrees(replicate=2), 'cpu', timeout=2.0))
    for seconds in (0, 4):
        with engine.main_first():
            time.sleep(seconds if rank == 0 else 0)
    engine.barrier()
    stop()


@pytest.mark.slow
def test_others_wait_for_the_main_process_longer_than_for_a_step() -> None:
    mp.spawn(worker, (free_port(),), nprocs=2)  # type: ignore[no-untyped-call]


def silent(rank: int, port: int) -> None:
    join_as(rank, port, 4)
    world = start(Degrees(replicate=2, shard=2), 'cpu', timeout=2.0)
    # each of the others waits for the last one along another axis
    axes = (world.data_mesh, world.mesh['replicate'], world.mesh['shard'])
    if rank == 3:
        time.sleep(8)
        return
    began = time.monotonic()
    with pytest.raises(RuntimeError) as lost:
        dist.all_reduce(torch.ones(1), group=axes[rank].get_group())
    assert is_lost(lost.value)
    assert time.monotonic() - began < 6


@pytest.mark.slow
def test_groups_of_a_grid_give_up_as_all_do() -> None:
    mp.spawn(silent, (free_port(),), nprocs=4)  # type: ignore[no-untyped-call]
