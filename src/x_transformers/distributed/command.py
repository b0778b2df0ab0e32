"""``torchrun … -m x_transformers train``: a run on a process grid. Only the main process writes files and prints."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.meeting import PATIENCE, meet, wait_for_count
from x_transformers.distributed.mesh import Degrees, MeshError, World, is_lost, start, stop
from x_transformers.distributed.refusals import check, option_refusals
from x_transformers.distributed.staged import StagedEngine
from x_transformers.flags.base import FlagError
from x_transformers.notices import unlogged
from x_transformers.training.build import build_model
from x_transformers.training.errors import TrainingError
from x_transformers.training.lock import locked
from x_transformers.training.options import WITH_TENSOR, TrainOptions, merge_for_resume
from x_transformers.training.run import RunConfig, begin, finish, prepare_run
from x_transformers.training.trainer import Interrupted

BAD_INPUT = 2
TOLD = '.told'  # a file in the run folder: one process has printed why all of them ended
LATER = 0.5  # for which the others wait, so that the main process speaks before they end
LOST = 1
TERMINATED = 128 + signal.SIGTERM
JOIN_TO_COMPLAIN = 30.0  # seconds for which a process that has a complaint waits for the others
T = TypeVar('T')


def train(parse: Callable[[], Any]) -> int:
    """The exit status of this process. Only one process prints what was wrong."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return train_or_say_why(parse)
    finally:
        on_term(before)


def train_or_say_why(parse: Callable[[], Any]) -> int:
    is_main = os.environ.get('RANK', '0') == '0'
    found: OwnOptions | BaseException
    try:
        with contextlib.nullcontext() if is_main else silent():
            found = read_options(parse)
    except (FlagError, TrainingError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise  # what was asked for was help
        found = error
    try:
        store = check_alike(found)
        if isinstance(found, BaseException):
            raise found
        world = start(found.degrees, found.options.device or 'auto', timeout=found.options.timeout, store=store)
    except (FlagError, TrainingError, SystemExit) as error:
        on_term(signal.SIG_IGN)
        if not is_main:
            time.sleep(LATER)
        elif isinstance(error, SystemExit):
            raise
        else:
            say_why(str(error))
        return BAD_INPUT
    asked, folder = found.asked, Path(found.options.run_dir)
    try:
        on_term(terminate)
        with ExitStack() as held, contextlib.nullcontext() if is_main else speechless():
            status = train_on(world, asked, held)
        stop()
        return status
    except (FlagError, TrainingError) as error:
        on_term(signal.SIG_IGN)
        if speaks_first(world, folder):
            say_why(str(error))
        return BAD_INPUT
    except Terminated:
        on_term(signal.SIG_IGN)
        if speaks_first(world, folder):
            say_why('stopped by SIGTERM between its steps; what was saved before is untouched')
        end_at_once(TERMINATED)
    except RuntimeError as error:
        on_term(signal.SIG_IGN)
        if not is_lost(error):
            raise
        if speaks_first(world, folder):
            told = str(error).splitlines()[0][:120]
            say_why(f'process {world.rank} has lost another one ({told}); start all of them again with --resume')
        end_at_once(LOST)


class Terminated(Exception):
    """SIGTERM arrived outside of the training steps."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def on_term(act: Any) -> None:
    """The launcher terminates all processes when one has ended. A process that is printing its error must not die at once."""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, act)


def say_why(sentence: str) -> None:
    print(f'x-transformers: {sentence}', file=sys.stderr)


class OwnOptions(NamedTuple):
    """The options that a process was started with."""

    asked: Any  # as it was parsed
    options: TrainOptions  # those of the run
    degrees: Degrees


def read_options(parse: Callable[[], Any]) -> OwnOptions:
    """Errors: ``FlagError`` and ``TrainingError`` for mistakes that this process alone can detect."""
    asked = parse()
    options = of_the_run(asked)
    degrees = Degrees.of(options.shard, tensor=options.tensor, context=options.context, pipeline=options.pipeline)
    check_options(options, degrees)
    check_rows(options, degrees.resolved(int(os.environ['WORLD_SIZE'])))
    return OwnOptions(asked, options, degrees)


def of_the_run(asked: Any) -> TrainOptions:
    """The options of the run. A resumed run keeps its options, and its grid, unless others are typed."""
    options: TrainOptions = asked.options
    if not options.resume:
        return options
    return merge_for_resume(options, RunConfig.read(Path(options.run_dir)).options, asked.typed)


def train_on(world: World, asked: Any, held: ExitStack) -> int:
    options: TrainOptions = asked.options

    def open_folder() -> RunConfig:
        held.enter_context(locked(Path(options.run_dir), create=not options.resume))
        Path(options.run_dir, TOLD).unlink(missing_ok=True)
        return begin(asked.flags, options, typed=asked.typed, typed_flags=asked.typed_flags)

    from x_transformers.cli.ending import say_written, stopped

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
    on_term(lambda number, frame: None)  # in steps it is noted; between them and the end there is nothing to stop
    try:
        run.train()
    except Interrupted as stop:
        with contextlib.nullcontext() if world.is_main else silent():
            if world.is_main:
                bar.close()
            return stopped(stop, options)
    on_term(terminate)
    if world.is_main:
        bar.close()
    comparison = finish(run, print if world.is_main else lambda text: None)
    if world.is_main:
        say_written(run, comparison)
    return 0


# what must fit


def check_rows(options: TrainOptions, degrees: Degrees) -> None:
    """Errors: ``MeshError`` for a batch that cannot be divided among the processes."""
    readers = degrees.replicate * degrees.shard
    if options.batch % readers:
        raise MeshError(
            f'--batch must be a multiple of {readers}, the number of processes that read different data, got {options.batch}: '
            'it counts the sequences of all of them. Give another.'
        )


def check_options(options: TrainOptions, degrees: Degrees) -> None:
    """Errors: ``MeshError`` naming every option that several processes do not support."""
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
    """Refuse flags that the grid does not support, before any data are read.

    Errors: ``MeshError`` naming them; ``FlagError`` as for a model that is trained.
    """
    options = config.options
    with torch.device('meta'), unlogged():
        model = build_model(config.flags)
    check(
        model, degrees, shard=options.shard, checkpoint=options.checkpointing, precision=None, compile=options.compile,
        offload=options.offload, **beside(options),
    )  # fmt: skip


def beside(options: TrainOptions) -> dict[str, bool]:
    """The other options of a tensor group."""
    return {name: getattr(options, name) for name in WITH_TENSOR}


def check_alike(found: OwnOptions | BaseException) -> Store | None:
    """Compare the options of all processes before the grid is made. Returns the store that they use.

    Errors: ``MeshError`` if they differ, or if another process has refused them.
    """
    if isinstance(found, OwnOptions):
        own: Any = ('', found.asked.flags, found.asked.options.to_json())
        timeout = found.options.timeout
    else:
        own = ('its options cannot be read.' if isinstance(found, SystemExit) else str(found), {}, {})
        timeout = JOIN_TO_COMPLAIN
    try:
        store, everywhere = meet(own, timeout=timeout)
    except (dist.DistError, TimeoutError, ValueError) as error:  # they do not come, or it was not said where they are
        if own[0]:
            return None  # the others may never have been started
        raise MeshError(f'not all processes can be reached ({str(error).splitlines()[0][:120]}). Start all of them.') from error
    if own[0] and everywhere[0][0]:
        return store  # the main process tells its own
    if everywhere[0][0]:
        raise MeshError(everywhere[0][0])
    for rank, (problem, flags, options) in enumerate(everywhere):
        if problem:
            raise MeshError(f'all processes must be started with what they can do, but process {rank} says: {problem}')
        if (flags, options) != everywhere[0][1:]:
            first = {**everywhere[0][1], **everywhere[0][2]}
            names = sorted(name for name, value in {**flags, **options}.items() if first.get(name) != value)
            raise MeshError(
                f'all processes must have the same options, got others in process {rank}: {", ".join(names)}. Start them alike.'
            )
    return store


def of_main(world: World, act: Callable[[], T]) -> T:
    """The result of ``act`` on the main process, on all processes; also its error."""
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


def end_at_once(status: int) -> NoReturn:
    """End without the usual cleanup, which would wait for messages that never arrive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def speaks_first(world: World, folder: Path) -> bool:
    """Whether this process prints the error: the main process if it has one, else the first of the others."""
    if not world.is_main:
        time.sleep(LATER)
    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whoever held the store is gone
            store = dist.distributed_c10d._get_default_store()
            answers.append(store.add('complained', 1) == 1)
            if world.is_main:
                wait_for_count(store, 'complained', world.size)

    # whoever holds the store may not answer
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PATIENCE if world.is_main else PATIENCE)
    return answers[0] if answers else is_first_in(folder)


def is_first_in(folder: Path) -> bool:
    """The same without a store, by a file in the run folder. The next start of the run removes it."""
    try:
        os.close(os.open(folder / TOLD, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # there is no such folder yet
        return True
    return True


@contextlib.contextmanager
def speechless() -> Iterator[None]:
    """Let only the main process print warnings that all processes raise."""
    with unlogged(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
