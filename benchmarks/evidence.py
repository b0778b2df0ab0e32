"""What `x-transformers ablate` costs beside the training that it does, and what a second worker gains.

    python benchmarks/evidence.py loop        processor time of a run of one-layer MQAR: 2,000 steps of 64 rows
    python benchmarks/evidence.py overhead    the whole command beside its optimizer steps alone, in turns
    python benchmarks/evidence.py share       the same from one command: its processor time beside what its own steps took
    python benchmarks/evidence.py workers     the whole command with one worker and with two, in turns

A measurement is a ratio of two that were taken in turns, and the median over `--pairs`. On a machine that does other work too,
only the processor times mean something, and of these `share` the most: both numbers are of the same minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from x_transformers.evidence.estimate import timed
from x_transformers.evidence.execute import execute, one_thread, prepared_model, quiet
from x_transformers.evidence.plan import question
from x_transformers.evidence.runs import ArmRun, Settings, TaskName
from x_transformers.evidence.tasks import make_task
from x_transformers.evidence.tasks.base import Task
from x_transformers.evidence.training import train_arm

IDEA = {'shift_tokens': 1}
WORDS = ('--task', 'mqar', '--base', 'depth=1', '--idea', 'shift_tokens=1')


class Unevaluated(Task):
    """The batches of a task, whose models nobody looks at."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def batch(self, seed: int, step: int) -> Any:
        return self.task.batch(seed, step)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        return self.task.model(flags)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


def settings_of(task: Task, steps: int) -> Settings:
    return Settings(steps=steps, lr=task.lr)


def training(steps: int, seeds: int) -> tuple[float, float]:
    """(processor time, wall time) of the optimizer steps of baseline and idea, one thread, nothing else."""
    one_thread()
    task = make_task('mqar')
    base = {**task.flags, 'depth': 1}
    models = [(seed, prepared_model(task, flags, seed, 'cpu')) for seed in range(seeds) for flags in (base, {**base, **IDEA})]
    cpu, wall = time.process_time(), time.perf_counter()
    with quiet():
        for seed, model in models:
            train_arm(Unevaluated(task), model, settings_of(task, steps), seed)
    return time.process_time() - cpu, time.perf_counter() - wall


def in_another_process(words: Sequence[str]) -> tuple[float, float, str]:
    """(processor time with that of its children, wall time, output) of this interpreter with other words."""
    started, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - started, done.stdout


def command(steps: int, seeds: int, workers: int) -> tuple[float, float, list[float]]:
    """(processor time, wall time) of the whole command, from its start to its last line, and the processor time of each run."""
    with tempfile.TemporaryDirectory() as folder:
        words = ['-m', 'x_transformers', 'ablate', *WORDS, '--steps', str(steps), '--seeds', str(seeds)]
        cpu, wall, _ = in_another_process([*words, '--workers', str(workers), '--out', str(Path(folder) / 'out')])
        results = [json.loads(path.read_text()) for path in Path(folder).glob('out/runs/*/result.json')]
    return cpu, wall, [result['seconds'] for result in results if 'value' in result]


def evaluating(steps: int) -> float:
    """The share of a run that evaluations take."""
    one_thread()
    asked = question({'task': 'mqar'}, {'depth': 1}, (), seeds=1, settings={'steps': steps})
    with quiet():
        step, evaluation = timed(asked)
    evaluations = len(asked.settings.evaluated()) * evaluation
    return evaluations / (evaluations + steps * step)


def loop() -> dict[str, Any]:
    one_thread()
    task = make_task('mqar')
    run = ArmRun(TaskName('mqar'), {**task.flags, 'depth': 1}, settings_of(task, 2000), 0)
    result = execute(run, task)
    return {'steps': 2000, 'rows': 64, 'seconds': result['seconds'], 'wall': result['wall'], 'wanted': 90.0}


def overhead(steps: int, seeds: int, pairs: int) -> dict[str, Any]:
    found = []
    for _ in range(pairs):
        alone = json.loads(in_another_process([__file__, 'training', '--steps', str(steps), '--seeds', str(seeds)])[2])
        cpu, wall, _ = command(steps, seeds, workers=1)
        found.append({'processor': cpu / alone['processor'] - 1, 'wall': wall / alone['wall'] - 1})
    medians = {name: statistics.median(one[name] for one in found) for name in ('processor', 'wall')}
    return {'steps': steps, 'runs': 2 * seeds, 'pairs': found, **medians, 'wanted': 0.05}


def share(steps: int, seeds: int, pairs: int) -> dict[str, Any]:
    found = []
    for _ in range(pairs):
        cpu, _, runs = command(steps, seeds, workers=1)
        evaluations = evaluating(steps)
        found.append({'processor': cpu / (sum(runs) * (1 - evaluations)) - 1, 'evaluations': evaluations, 'seconds': cpu})
    median = statistics.median(one['processor'] for one in found)
    return {'steps': steps, 'runs': 2 * seeds, 'pairs': found, 'processor': median, 'wanted': 0.05}


def workers(steps: int, seeds: int, pairs: int) -> dict[str, Any]:
    gains = []
    for pair in range(pairs):
        order = (1, 2) if pair % 2 == 0 else (2, 1)
        walls = {count: command(steps, seeds, workers=count)[1] for count in order}
        gains.append(walls[1] / walls[2])
    return {'steps': steps, 'runs': 2 * seeds, 'pairs': gains, 'gain': statistics.median(gains), 'wanted': 1.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['loop', 'overhead', 'share', 'workers', 'training'])
    parser.add_argument('--steps', type=int, default=2000)
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--pairs', type=int, default=3)
    options = parser.parse_args()
    found: dict[str, Any]
    if options.what == 'training':
        cpu, wall = training(options.steps, options.seeds)
        found = {'processor': cpu, 'wall': wall}
    elif options.what == 'loop':
        found = loop()
    else:
        measure = {'overhead': overhead, 'share': share, 'workers': workers}[options.what]
        found = measure(options.steps, options.seeds, options.pairs)
    print(json.dumps({'measured': options.what, 'processors': os.cpu_count(), 'torch': torch.__version__, **found}))


if __name__ == '__main__':
    main()
