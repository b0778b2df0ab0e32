"""The estimated duration of an experiment, from timed steps and an evaluation of each baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from x_transformers.evidence.execute import WARM, prepared_model, quiet, stepper
from x_transformers.evidence.experiment import Experiment, Question
from x_transformers.evidence.runs import CostRun, Job

TIMED = 3
"""Steps that are timed."""


def estimated_seconds(experiment: Experiment, jobs: Collection[Job], workers: int) -> float | None:
    """Seconds until ``jobs`` are done by so many free processors; None where it is not known.

    Ideas are taken to be as fast as the baseline of their task. A task of one's own may do anything, also end the process:
    it is left to the workers.
    """
    if any(':' in job.task.name for job in jobs):
        return None
    hashes, total = {job.hash for job in jobs}, 0.0
    for question in experiment.questions:
        identity = {question.title: experiment.identities[question.title]}
        part = Experiment((question,), experiment.folder, experiment.costs, identity)
        mine = [job for job in (*part.selection_jobs({}), *part.jobs({})) if job.hash in hashes]
        if not mine:
            continue
        try:
            with one_thread_for_now(), quiet():
                step, evaluation = timed(question)
        except Exception:  # its runs tell why
            return None
        evaluations = len(question.settings.evaluated())
        run = question.settings.steps * step + evaluations * evaluation
        total += sum(2 * (job.steps + WARM) * step if isinstance(job, CostRun) else run for job in mine)
    return total / max(1, workers)


def timed(question: Question) -> tuple[float, float]:
    """(processor time of a step, of an evaluation), of the baseline."""
    task = question.the_task()
    model = prepared_model(task, question.base, 0, question.device)
    step = stepper(task, model, question.settings.lr)
    seconds = [step(index) for index in range(WARM + TIMED)]
    started = time.process_time()
    task.evaluate(model)
    return statistics.median(seconds[WARM:]), time.process_time() - started


@contextmanager
def one_thread_for_now() -> Iterator[None]:
    """As workers have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_words(seconds: float) -> str:
    """``40 seconds``, ``9 minutes``, ``2.5 hours``."""
    if seconds < 90:
        return f'{round(seconds)} seconds' if seconds >= 1.5 else '1 second'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'
