"""``torchrun … -m x_transformers train``: the same run as in one process, on a grid. The main process speaks and writes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, MeshError, World, start, stop
from x_transformers.distributed.refusals import check, option_refusals
from x_transformers.distributed.staged import StagedEngine
from x_transformers.flags.base import FlagError
from x_transformers.training.build import build_model
from x_transformers.training.errors import TrainingError
from x_transformers.training.lock import locked
from x_transformers.training.options import WITH_TENSOR, TrainOptions, merge_for_resume
from x_transformers.training.run import RunConfig, begin, finish, prepare_run
from x_transformers.training.trainer import Interrupted

BAD_INPUT = 2
PATIENCE = 3.0  # seconds, of the ten in which all are to end
LOST = 1
T = TypeVar('T')


def train(parse: Callable[[], Any]) -> int:
    """The exit status of this process. One of all processes says what was wrong."""
    is_main = os.environ.get('RANK', '0') == '0'
    try:
        with contextlib.nullcontext() if is_main else silent():
            asked = parse()
        options = of_the_run(asked)
        size = int(os.environ['WORLD_SIZE'])
        degrees = Degrees.of(options.shard, tensor=options.tensor, context=options.context, pipeline=options.pipeline)
        check_options(options, degrees)
        check_rows(options, degrees.resolved(size))
        world = start(degrees, options.device or 'auto', timeout=options.timeout)
    except (FlagError, TrainingError):
        if is_main:
            raise
        return BAD_INPUT
    try:
        with ExitStack() as held:
            status = train_on(world, asked, held)
        stop()
        return status
    except (FlagError, TrainingError):
        if speaks_first(world):
            raise
        return BAD_INPUT
    except RuntimeError as error:
        if not is_lost(error):
            raise
        if speaks_first(world):
            print(
                f'x-transformers: process {world.rank} has lost another one ({str(error).splitlines()[0][:120]}); start all of '
                'them again with --resume',
                file=sys.stderr,
            )
        end_at_once()


def of_the_run(asked: Any) -> TrainOptions:
    """The options, and those of a run that is resumed where others were not typed: it keeps its grid, too."""
    options: TrainOptions = asked.options
    if not options.resume:
        return options
    return merge_for_resume(options, RunConfig.read(Path(options.run_dir)).options, asked.typed)


def train_on(world: World, asked: Any, held: ExitStack) -> int:
    options: TrainOptions = asked.options

    def open_folder() -> RunConfig:
        held.enter_context(locked(Path(options.run_dir), create=not options.resume))
        return begin(asked.flags, options, typed=asked.typed, typed_flags=asked.typed_flags)

    from x_transformers.cli.ending import say_written, stopped

    check_alike(world, asked)
    config = of_main(world, open_folder)
    options = config.options
    check_rows(options, world.degrees)
    check_options(options, world.degrees)
    check_model(config, world.degrees)
    precision: Literal['bf16'] | None = 'bf16' if options.precision == 'bf16' and options.shard != 'none' else None
    kind = StagedEngine if world.degrees.pipeline > 1 else MeshEngine
    engine = kind(
        world, shard=options.shard, precision=precision, checkpoint=options.checkpointing, compile=options.compile,
        offload=options.offload, **beside(options),
    )  # fmt: skip
    if world.is_main:
        from x_transformers.cli.bar import Bar

        bar: Any = held.enter_context(Bar(options.steps))
        run = prepare_run(config, bar.write, [bar], engine)
        bar.start(run.trainer.step)
    else:
        run = prepare_run(config, lambda text: None, [], engine)
    try:
        run.train()
    except Interrupted as stop:
        with contextlib.nullcontext() if world.is_main else silent():
            if world.is_main:
                bar.close()
            return stopped(stop, options)
    if world.is_main:
        bar.close()
    comparison = finish(run, print if world.is_main else lambda text: None)
    if world.is_main:
        say_written(run, comparison)
    return 0


# what must fit


def check_rows(options: TrainOptions, degrees: Degrees) -> None:
    """Errors: ``MeshError`` for a batch that the processes cannot share."""
    readers = degrees.replicate * degrees.shard
    if options.batch % readers:
        raise MeshError(
            f'--batch must be a multiple of {readers}, the number of processes that read different data, got {options.batch}: '
            'it counts the sequences of all of them. Give another.'
        )


def check_options(options: TrainOptions, degrees: Degrees) -> None:
    """Errors: ``MeshError`` naming every option that several processes cannot have."""
    wrong = option_refusals(
        degrees, compile=options.compile, offload=options.offload, shard=options.shard, checkpoint=options.checkpointing,
        **beside(options),
    )  # fmt: skip
    if options.lora:
        wrong.append('--lora must be 0 with several processes: low-rank changes are added in one process.')
    if degrees.pipeline > 1 and options.mup:
        wrong.append('--mup must be off with --pipeline: each stage would draw other weights. Use --shard full.')
    if wrong:
        raise MeshError(' '.join(wrong))


def check_model(config: RunConfig, degrees: Degrees) -> None:
    """Refuse flags that the grid cannot have, before any data are read.

    Errors: ``MeshError`` naming them; ``FlagError`` as for a model that is trained.
    """
    options = config.options
    with torch.device('meta'):
        model = build_model(config.flags)
    check(
        model, degrees, shard=options.shard, checkpoint=options.checkpointing, precision=None, compile=options.compile,
        offload=options.offload, **beside(options),
    )  # fmt: skip


def beside(options: TrainOptions) -> dict[str, bool]:
    """What else a tensor group shares."""
    return {name: getattr(options, name) for name in WITH_TENSOR}


def check_alike(world: World, asked: Any) -> None:
    """Errors: ``MeshError`` if processes were started with different options."""
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, (asked.flags, asked.options.to_json()))
    for rank, (flags, options) in enumerate(everywhere):
        if (flags, options) != everywhere[0]:
            first = {**everywhere[0][0], **everywhere[0][1]}
            names = sorted(name for name, value in {**flags, **options}.items() if first.get(name) != value)
            raise MeshError(
                f'all processes must have the same options, got others in process {rank}: {", ".join(names)}. Start them alike.'
            )


def of_main(world: World, act: Callable[[], T]) -> T:
    """What the main process gets out of ``act``, everywhere; its error, too."""
    found: list[Any] = [None, None]
    if world.is_main:
        try:
            found = [act(), None]
        except (FlagError, TrainingError) as error:
            found = [None, error]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise TrainingError(str(found[1]))
    result: T = found[0]
    return result


def end_at_once() -> NoReturn:
    """In the orderly way messages that never come would be waited for, until they are given up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def speaks_first(world: World) -> bool:
    """Whether this process is to say what went wrong: the main one if it knows, else the first of the others."""
    if not world.is_main:
        time.sleep(0.5)
    answers: list[bool] = []

    def ask() -> None:
        try:
            store = dist.distributed_c10d._get_default_store()
            answers.append(store.add('complained', 1) == 1)
            # the main process may hold the store, which the others are still to ask
            deadline = time.monotonic() + PATIENCE
            while world.is_main and store.add('complained', 0) < world.size and time.monotonic() < deadline:
                time.sleep(0.05)
        except Exception:  # whoever held the store is gone
            answers.append(True)

    # whoever holds the store may not answer
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PATIENCE if world.is_main else PATIENCE)
    return answers[0] if answers else True


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, or does not answer."""
    text = str(error)
    signs = ('Connection closed by peer', 'Connection reset by peer', 'Timed out waiting', 'gloo', 'Broken pipe')
    return isinstance(error, (dist.DistError, dist.DistBackendError)) or any(sign in text for sign in signs)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
