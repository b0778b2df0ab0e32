"""What training costs beside the arithmetic of one process: data, their loading, parts of parameters, copies, saving.

``python benchmarks/scaling.py [data loader parts copies saving memory …]``. Width 512, 8 rows of 512 tokens, one thread for
each process. Times that are compared are taken in turns, and the median of the ratios counts. Work is measured in processor
time, so that other programs count little; what processes do together in time on the clock, which needs free processors.
"""

from __future__ import annotations

import copy
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, start, stop
from x_transformers.distributed.plan import Size, needs
from x_transformers.training.batches import TokenBatches
from x_transformers.training.build import build_model
from x_transformers.training.checkpoint import Checkpoints
from x_transformers.training.data import standard_library
from x_transformers.training.engine import Engine
from x_transformers.training.options import TrainerOptions
from x_transformers.training.shards import prepare
from x_transformers.training.tokens import train_bpe
from x_transformers.training.trainer import Trainer

WIDTH, ROWS, LENGTH, ROUNDS = 512, 8, 512, 7
FLAGS = {'dim': WIDTH, 'depth': 4, 'heads': 8, 'attn_dim_head': 64, 'rotary_pos_emb': True, 'max_seq_len': LENGTH}
# for two processes of a gigabyte each and more
LARGE = {'dim': 1024, 'depth': 8, 'heads': 16, 'attn_dim_head': 64, 'rotary_pos_emb': True, 'max_seq_len': 256}


def rows(rank: int = 0, size: int = 1, count: int = ROWS, length: int = LENGTH) -> Callable[[int], Tensor]:
    def batch(index: int) -> Tensor:
        made = torch.randint(256, (count, length), generator=torch.Generator().manual_seed(index))
        return made[rank::size]

    return batch


def trainer(engine: Engine, model: nn.Module, batches: Any, **more: Any) -> Trainer:
    return Trainer(model, batches, TrainerOptions(steps=10**6), engine=engine, **more)


def step_of(made: Trainer) -> Callable[[], None]:
    def step() -> None:
        made.one_step()
        made.step += 1

    return step


def seconds(act: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    act()
    return clock() - began


# what is measured


def data() -> None:
    """Text into tokens of a BPE, with checksums and files."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    sources = standard_library()
    texts = [source.path.read_bytes() for source in sources]
    size = sum(map(len, texts))
    tokenizer = train_bpe(iter(texts), 8192)
    found = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            found.append(seconds(lambda: prepare(sources, tokenizer, cache=Path(folder)), time.process_time))
    print(f'data: {size / 1e6 / statistics.median(found):.1f} MB of text per second of one processor ({size / 1e6:.0f} MB)')


def loader() -> None:
    """A batch of token shards, as a share of the step that learns from it."""
    sources = standard_library()
    tokenizer = train_bpe((source.path.read_bytes() for source in sources[:100]), 8192)
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(sources, tokenizer, cache=Path(folder))
        batches = TokenBatches([(made.train, 1.0)], batch=ROWS, window=LENGTH, seed=0)
        step = step_of(trainer(Engine(), build_model(FLAGS, 8192), batches))
        step()
        shares = []
        for index in range(ROUNDS):
            fetched = seconds(lambda number=index: batches.batch(number), time.process_time)
            shares.append(fetched / seconds(step, time.process_time))
    print(f'loader: {100 * statistics.median(shares):.2f} % of a step (width {WIDTH}, depth 4, {ROWS} x {LENGTH} tokens)')


def parts() -> None:
    """FSDP2 on one process against the plain step."""
    world = start(Degrees(shard=1), 'cpu')
    model = build_model(FLAGS)
    plain = step_of(trainer(Engine(), copy.deepcopy(model), rows()))
    engine = MeshEngine(world, shard='full')
    spread = step_of(trainer(engine, engine.spread(model), rows()))
    for step in (plain, spread):
        step()
    ratios = [seconds(spread, time.process_time) / seconds(plain, time.process_time) for _ in range(ROUNDS)]
    stop()
    tell('parts: a step of FSDP2 on one process takes', ratios, 'plain steps')


def copies() -> None:
    """Steps of two processes with copies against those of one process, on the clock."""
    with_two(copies_here)


def copies_here(rank: int) -> None:
    model = build_model(FLAGS)
    alone = step_of(trainer(Engine(), copy.deepcopy(model), rows()))
    engine = MeshEngine(start(Degrees(replicate=2), 'cpu'))
    both = step_of(trainer(engine, engine.spread(model), rows(rank, 2, 2 * ROWS)))
    both()
    if rank == 0:
        alone()
    ratios = []
    for _ in range(ROUNDS):
        dist.barrier()
        together = seconds(both, time.perf_counter)
        dist.barrier()
        if rank == 0:
            # two batches in one, while the other process waits
            ratios.append(2 * seconds(alone, time.perf_counter) / together)
        dist.barrier()
    if rank == 0:
        tell(f'copies: with a load of {os.getloadavg()[0]:.1f}, two processes do', ratios, 'times the work of one')


def saving() -> None:
    """How long a checkpoint that is written in the background holds up training."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(FLAGS)
        made = trainer(Engine(), model, rows(count=1, length=64), store=Checkpoints(Path(folder)))
        step_of(made)()
        found = []
        for _ in range(3):
            found.append(seconds(made.save, time.perf_counter))
            made.store.wait()  # type: ignore[union-attr]
            step_of(made)()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f'saving: stops training for {statistics.median(found):.2f} s ({count / 1e6:.0f} million parameters, AdamW)')


def memory() -> None:
    """The growth of the peak of resident memory on each of two processes, against the plan."""
    # memory that is let go of is handed back, whatever its size; else the peak would be that of the allocator's heap
    os.environ['MALLOC_MMAP_THRESHOLD_'] = str(1 << 16)
    with_two(memory_here)


def memory_here(rank: int) -> None:
    world = start(Degrees(shard=2), 'cpu')
    batch = rows(rank, 2, 4, LARGE['max_seq_len'])  # type: ignore[arg-type]

    def train(flags: dict[str, Any]) -> None:
        engine = MeshEngine(world, shard='full')
        made = trainer(engine, engine.build(lambda: build_model(flags), world.device, 0), batch)
        for _ in range(3):
            made.one_step()

    # what the libraries need once
    train(LARGE | {'dim': 64, 'depth': 1, 'heads': 1})
    before = peak()
    train(LARGE)
    grown = torch.tensor(float(peak() - before))
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    if rank == 0:
        size = Size.of(LARGE, seq_len=LARGE['max_seq_len'], half=False)  # type: ignore[arg-type]
        need = next(n for n in needs(size, devices=2, per_node=2, batch=4, half=False) if n.degrees.shard == 2)
        print(
            f'memory: planned {need.total / 1e9:.2f} GB, grown by {grown.item() / 1e9:.2f} GB ({need.total / grown.item():.2f})'
        )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# two processes


def with_two(act: Callable[[int], None]) -> None:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    mp.spawn(process, (act, port), nprocs=2)  # type: ignore[no-untyped-call]


def process(rank: int, act: Callable[[int], None], port: int) -> None:
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    act(rank)
    stop()


def tell(what: str, ratios: list[float], unit: str) -> None:
    print(
        f'{what} {statistics.median(ratios):.2f} {unit} (from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)'
    )


MEASURES = {act.__name__: act for act in (data, loader, parts, copies, saving, memory)}

if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in sys.argv[1:] or MEASURES:
        MEASURES[name]()
