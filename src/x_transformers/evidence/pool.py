"""Execution of many runs: in this process, or in workers of one thread each, whose failure is harmless."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from x_transformers.evidence.execute import execute, one_thread
from x_transformers.evidence.runs import Job, RunFolder
from x_transformers.evidence.tasks.base import Task

Told = Callable[[Job], None]
POLL = 0.5
DONE, BUSY, FAILED = 'done', 'busy', 'failed'


def attempt(store: RunFolder, job: Job, task: Task | None = None) -> tuple[str, str]:
    """Do a run unless it is done or somebody else works on it: (what came of it, why it failed)."""
    with store.claim(job) as mine:
        if not mine:
            return BUSY, ''
        if store.settled(job):
            return DONE, ''
        try:
            result = execute(job, task)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            why = sentence(error)
            store.write_failure(job, why)
            return FAILED, why
        store.write_result(job, result)
        return DONE, ''


def sentence(error: BaseException) -> str:
    """Why a run failed, in one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    # on a processor, torch raises nothing more special than a RuntimeError
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        asked = re.search(r'tried to allocate ([\d.]+ \w+)', text, re.IGNORECASE)
        return 'out of memory' + (f': it tried to allocate {asked[1]}' if asked else '')
    if type(error).__module__.startswith('x_transformers.'):
        return text[:500]
    frames = traceback.extract_tb(error.__traceback__)
    where = f' ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})' if frames else ''
    return f'{type(error).__name__}: {text[:400]}{where}'


def run_here(store: RunFolder, jobs: Iterable[Job], told: Told, deadline: float | None, task: Task | None = None) -> None:
    """One after the other, in this process."""
    waiting = deque(jobs)
    idle = 0
    while waiting and not (deadline is not None and time.monotonic() > deadline):
        job = waiting.popleft()
        outcome, _ = attempt(store, job, task)
        if outcome != BUSY:
            told(job)
            idle = 0
            continue
        waiting.append(job)
        idle += 1
        if idle >= len(waiting):
            time.sleep(POLL)
            idle = 0


# ---------------------------------------------------------------- workers


@dataclass
class Worker:
    process: Any
    pipe: Connection
    job: Job | None = None


def worker_main(pipe: Connection, folder: str, path: Sequence[str]) -> None:
    """Do the runs that come through the pipe, until it closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    sys.path[:] = list(path)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    one_thread()
    store = RunFolder(folder)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        outcome = attempt(store, job)
        try:
            pipe.send(outcome)
        except OSError:  # the parent is gone
            return


def start_worker(store: RunFolder) -> Worker:
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=worker_main, args=(theirs, str(store.folder), list(sys.path)), daemon=True)
    before = os.environ.get('OMP_NUM_THREADS')
    os.environ['OMP_NUM_THREADS'] = '1'
    try:
        process.start()
    finally:
        if before is None:
            del os.environ['OMP_NUM_THREADS']
        else:
            os.environ['OMP_NUM_THREADS'] = before
    theirs.close()
    return Worker(process, ours)


def run_in_workers(store: RunFolder, jobs: Iterable[Job], workers: int, told: Told, deadline: float | None) -> None:
    """Several at a time. A worker that dies takes its run with it, which is then a failure that says so."""
    waiting = deque(jobs)
    team = [start_worker(store) for _ in range(min(workers, len(waiting)))]
    busy_since = 0
    try:
        while waiting or any(worker.job for worker in team):
            late = deadline is not None and time.monotonic() > deadline
            if late:
                waiting.clear()
            for index, worker in enumerate(team):
                if worker.job is None and waiting and busy_since < len(waiting) + 1:
                    if not worker.process.is_alive():
                        team[index] = worker = start_worker(store)
                    worker.job = waiting.popleft()
                    worker.pipe.send(worker.job)
            active = [worker for worker in team if worker.job is not None]
            ready = wait([w.pipe for w in active] + [w.process.sentinel for w in active], timeout=POLL) if active else []
            if not ready:
                busy_since = 0
                if not active:
                    time.sleep(POLL)
            for worker in active:
                if worker.pipe not in ready and worker.process.sentinel not in ready:
                    continue
                job = worker.job
                if job is None:
                    continue
                try:
                    outcome, _ = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    store.write_failure(job, death(worker.process.exitcode))
                    outcome = FAILED
                worker.job = None
                if outcome == BUSY:
                    waiting.append(job)
                    busy_since += 1
                else:
                    busy_since = 0
                    told(job)
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.process.join()
            worker.pipe.close()


def death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ', which the system sends when memory runs out' if name == 'SIGKILL' else ''
        return f'the worker was killed by {name}{hint}'
    return f'the worker ended with status {code}'


def run_all(
    store: RunFolder,
    jobs: Sequence[Job],
    *,
    workers: int = 0,
    told: Told = lambda job: None,
    deadline: float | None = None,
    task: Task | None = None,
) -> None:
    """Do the runs that are not done yet, in this order. ``workers`` 0: in this process. ``deadline``: of ``time.monotonic``.

    A KeyboardInterrupt ends the workers and is passed on; finished runs are on disk.
    """
    todo = [job for job in jobs if not store.settled(job)]
    if not todo:
        return
    if workers == 0:
        run_here(store, todo, told, deadline, task)
    else:
        run_in_workers(store, todo, workers, told, deadline)
