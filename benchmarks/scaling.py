"""What training costs beside the arithmetic of one process: data, their loading, parts of parameters, copies, saving.

``python benchmarks/scaling.py [data loader parts copies saving memory …]`` ends in a table: what was found, what is wanted, and
whether it is so. Width 512, 8 rows of 512 tokens, one thread for each process. Times that are compared are taken in turns, and
the median of the ratios counts. Work is measured in processor time, so that other programs count little; what processes do
together, and how long training stops, in time on the clock, which needs free processors.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from x_transformers.distributed.costs import RowGroup
from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, start, stop
from x_transformers.distributed.plan import Size, needs
from x_transformers.distributed.staged import StagedEngine
from x_transformers.training.batches import TokenBatches
from x_transformers.training.build import build_model
from x_transformers.training.checkpoint import Checkpoints
from x_transformers.training.data import standard_library
from x_transformers.training.engine import Engine
from x_transformers.training.options import TrainerOptions
from x_transformers.training.shards import prepare_shards
from x_transformers.training.tokens import JsonTokenizer, train_bpe
from x_transformers.training.trainer import Trainer

WIDTH, ROWS, LENGTH, ROUNDS = 512, 8, 512, 7
FLAGS = {'dim': WIDTH, 'depth': 4, 'heads': 8, 'attn_dim_head': 64, 'rotary_pos_emb': True, 'max_seq_len': LENGTH}
# for two processes of a gigabyte each and more
LARGE = {'dim': 1024, 'depth': 10, 'heads': 16, 'attn_dim_head': 64, 'rotary_pos_emb': True, 'max_seq_len': 256}


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


def in_turns(first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    """How much longer ``first`` takes than ``second``, round by round. Each begins every other round."""
    ratios = []
    for index in range(ROUNDS):
        if index % 2:
            below, above = seconds(second, clock), seconds(first, clock)
        else:
            above, below = seconds(first, clock), seconds(second, clock)
        ratios.append(above / below)
    return ratios


class Found(NamedTuple):
    """One line of the table: the median of the values counts, and must lie in a range."""

    what: str
    values: list[float]
    unit: str
    least: float = 0.0
    most: float = float('inf')

    @property
    def middle(self) -> float:
        return statistics.median(self.values)

    @property
    def wanted(self) -> str:
        bounds = ((self.least, '≥', 0.0), (self.most, '≤', float('inf')))
        return ', '.join(f'{sign} {bound:g}' for bound, sign, free in bounds if bound != free) or '–'

    def row(self) -> str:
        is_so = 'yes' if self.least <= self.middle <= self.most else '**no**'
        spread = f'{min(self.values):.3g} … {max(self.values):.3g}'
        cells = (self.what, f'{self.middle:.3g} {self.unit}'.strip(), spread, self.wanted, is_so if self.wanted != '–' else '–')
        return f'| {" | ".join(cells)} |'


# what is measured


def data() -> list[Found]:
    """Text into tokens of a BPE, with checksums and files; and what `tokenizers` alone needs for the same text, by turns."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    sources = standard_library()
    texts = [source.path.read_bytes() for source in sources]
    size = sum(map(len, texts))
    trained = train_bpe(iter(texts), 8192)

    def prepared(folder: str) -> None:
        # a new one each time: nothing is known of an earlier round
        prepare_shards(sources, JsonTokenizer(trained.data), cache=Path(folder))

    def encoded() -> None:
        alone = JsonTokenizer(trained.data).made
        for text in texts:
            alone.encode_batch_fast([text.decode('utf-8', 'replace')], add_special_tokens=False)

    rates: dict[str, list[float]] = {'ours': [], 'alone': [], 'clock': []}
    for _ in range(3):
        rates['alone'].append(size / 1e6 / seconds(encoded, time.process_time))
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            rates['ours'].append(size / 1e6 / seconds(lambda: prepared(folder), time.process_time))
            rates['clock'].append(size / 1e6 / (time.perf_counter() - began))
    return [
        Found(f'preparation of {size / 1e6:.0f} MB of text with BPE, on one processor', rates['ours'], 'MB/s', least=5.0),
        Found('the same by the clock', rates['clock'], 'MB/s'),
        Found('`encode_batch_fast` alone, by turns with it', rates['alone'], 'MB/s'),
    ]


def loader() -> list[Found]:
    """A batch of token shards, as a share of the step that learns from it."""
    sources = standard_library()
    tokenizer = train_bpe((source.path.read_bytes() for source in sources[:100]), 8192)
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_shards(sources, tokenizer, cache=Path(folder))
        batches = TokenBatches([(made.train, 1.0)], batch=ROWS, window=LENGTH, seed=0)
        step = step_of(trainer(Engine(), build_model(FLAGS, 8192), batches))
        step()
        numbers = iter(range(10**6))
        shares = in_turns(lambda: batches.batch(next(numbers)), step, time.process_time)
    return [Found('a batch, as a share of its step', [100 * share for share in shares], '%', most=2.0)]


def parts() -> list[Found]:
    """FSDP2 on one process against the plain step."""
    world = start(Degrees(shard=1), 'cpu')
    model = build_model(FLAGS)
    plain = step_of(trainer(Engine(), copy.deepcopy(model), rows()))
    engine = MeshEngine(world, shard='full')
    spread = step_of(trainer(engine, engine.spread(model), rows()))
    for step in (plain, spread):
        step()
    ratios = in_turns(spread, plain, time.process_time)
    stop()
    return [Found('a step of FSDP2 on one process', ratios, 'plain steps', most=1.05)]


def copies() -> list[Found]:
    """Steps of two processes with copies against those of one process, on the clock."""
    return [Found('work of two processes with copies', with_two(copies_here), 'times that of one', least=1.7)]


def copies_here(rank: int) -> list[float]:
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
    return ratios


def saving() -> list[Found]:
    """How long a checkpoint that is written in the background holds up training: weights and averages are copied, no more."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(FLAGS)
        made = trainer(Engine(), model, rows(count=1, length=64), store=Checkpoints(Path(folder)))
        step_of(made)()
        on_clock, own, copied = [], [], []
        tensors = [
            *model.parameters(),
            *(p.detach().clone() for p in model.parameters()),
            *map(torch.zeros_like, model.parameters()),
        ]
        for _ in range(ROUNDS):
            began, worked = time.perf_counter(), time.thread_time()
            made.save()
            on_clock.append(time.perf_counter() - began)
            own.append(time.thread_time() - worked)
            made.store.wait()  # type: ignore[union-attr]
            worked = time.thread_time()
            _ = [tensor.detach().to('cpu', copy=True) for tensor in tensors]
            copied.append(time.thread_time() - worked)
            step_of(made)()
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        Found(
            f'a checkpoint in the background stops training ({count / 1e6:.0f} million parameters, AdamW)',
            on_clock,
            's',
            most=0.5,
        ),
        Found('the same in processor time', own, 's', most=0.5),
        Found('the same, against copies of as many tensors', [a / b for a, b in zip(own, copied, strict=True)], 'times'),
        *saving_of_two(),
    ]


def saving_of_two() -> list[Found]:
    """The same of two processes with parts of each parameter, each of which copies its own."""
    found = with_two(saving_here)
    return [
        Found('a checkpoint of two processes in the background stops training', found[::2], 's', most=0.5),
        Found('the same in processor time', found[1::2], 's', most=0.5),
    ]


def saving_here(rank: int) -> list[float]:
    engine = MeshEngine(start(Degrees(shard=2), 'cpu'), shard='full')
    found = []
    with tempfile.TemporaryDirectory() as folder:
        places = [folder]
        dist.broadcast_object_list(places)
        made = trainer(engine, engine.spread(build_model(FLAGS)), rows(rank, 2, 2, 64), store=engine.store(Path(places[0])))
        for _ in range(ROUNDS):
            step_of(made)()
            dist.barrier()
            began, worked = time.perf_counter(), time.thread_time()
            made.save()
            found += [time.perf_counter() - began, time.thread_time() - worked]
            made.store.wait()  # type: ignore[union-attr]
        dist.barrier()
    return found


# (grid, options of the engine, of the trainer, of the plan)
GRIDS: dict[str, tuple[Degrees, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'parts': (Degrees(shard=2), {'shard': 'full'}, {}, {}),
    'stages': (Degrees(pipeline=2), {}, {'grad_accum': 4}, {'pipeline': 2}),
    'slices': (Degrees(context=2), {'shard': 'full'}, {}, {'group': RowGroup(context=2)}),
    'a tensor group': (
        Degrees(tensor=2), {'sequence_parallel': True, 'loss_parallel': True}, {}, {'group': RowGroup(2, True, True)}
    ),
}  # fmt: skip


def memory() -> list[Found]:
    """The growth of the peak of resident memory on each of two processes, against the plan."""
    # memory that is let go of is handed back, whatever its size; else the peak would be that of the allocator's heap
    os.environ['MALLOC_MMAP_THRESHOLD_'] = str(1 << 16)
    found = []
    for name in GRIDS:
        planned, grown = planned_bytes(name), with_two(partial(memory_here, name))
        values = [got / want for got, want in zip(grown, planned, strict=True)]
        for rank, (value, want) in enumerate(zip(values, planned, strict=True)):
            what = f'growth of the peak of memory with {name}, process {rank}, {want / 1e9:.2f} GB planned'
            found.append(Found(what, [value], 'times the plan', least=0.9, most=1.1))
    return found


def planned_bytes(name: str) -> list[float]:
    """Of each of two processes."""
    degrees, how, training, planning = GRIDS[name]
    size = Size.of(LARGE, seq_len=LARGE['max_seq_len'], half=False, **planning)  # type: ignore[arg-type]
    rows_of_all = 4 if degrees.shard == 2 else 2
    found = list(needs(size, devices=2, per_node=2, batch=rows_of_all, half=False, micros=training.get('grad_accum', 1)))
    kind = f'--shard {how.get("shard", "none")}'
    return [next(need for need in found if need.stage == rank or kind in need.name).total for rank in range(2)]


def memory_here(name: str, rank: int) -> list[float]:
    degrees, how, training, _ = GRIDS[name]
    world = start(degrees, 'cpu')
    batch = rows(world.data_rank, world.data_size, 2 * world.data_size, LARGE['max_seq_len'])  # type: ignore[arg-type]

    def train(flags: dict[str, Any]) -> None:
        engine = (StagedEngine if degrees.pipeline > 1 else MeshEngine)(world, **how)
        model = engine.build(lambda: build_model(flags), world.device, 0)
        made = Trainer(model, batch, TrainerOptions(steps=10**6, **training), engine=engine)
        for _ in range(3):
            made.one_step()

    # what the libraries need once
    train(LARGE | {'dim': 64, 'depth': 2, 'heads': 2})
    before = peak()
    train(LARGE)
    grown = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(grown, torch.tensor([float(peak() - before)], dtype=torch.float64))
    return [float(each) for each in grown]


def peak() -> int:
    status = Path('/proc/self/status')
    if status.exists():
        # of this program alone; the other figure begins with that of the program which has started it
        return int(re.search(r'VmHWM:\s+(\d+)', status.read_text(encoding='ascii'))[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# two processes


def with_two(act: Callable[[int], list[float]]) -> list[float]:
    """What the first of two processes has found."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'found'
        mp.spawn(process, (act, port, path), nprocs=2)  # type: ignore[no-untyped-call]
        values: list[float] = json.loads(path.read_text(encoding='utf-8'))
    return values


def process(rank: int, act: Callable[[int], list[float]], port: int, path: Path) -> None:
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    values = act(rank)
    if rank == 0:
        path.write_text(json.dumps(values), encoding='utf-8')
    stop()


MEASURES = {act.__name__: act for act in (data, loader, parts, copies, saving, memory)}

if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    asked = sys.argv[1:] or list(MEASURES)
    print(
        f'{len(os.sched_getaffinity(0))} processors, a load of {os.getloadavg()[0]:.1f} at the start, torch {torch.__version__}'
    )
    print('\n| what | found | from … to | wanted | met |\n| --- | ---: | ---: | ---: | --- |', flush=True)
    for name in asked:
        for line in MEASURES[name]():
            print(line.row(), flush=True)
