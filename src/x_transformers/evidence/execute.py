"""Execution of one run: build the model, pair its initial values, train it with the package's trainer, evaluate it."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from x_transformers.evidence.draws import seed_of
from x_transformers.evidence.pairing import fill_by_name
from x_transformers.evidence.runs import ArmRun, CostRun, Job
from x_transformers.evidence.tasks import make_task
from x_transformers.evidence.tasks.base import Task
from x_transformers.evidence.training import train_arm
from x_transformers.tensor_types import Shaped
from x_transformers.training.errors import TrainingError
from x_transformers.training.mup import mup_init_
from x_transformers.training.trainer import loss_of, on_device

LAST = 3
"""A run is judged by the mean of so many evaluations at its end."""
WARM = 2
"""Steps in front of those that are timed: they allocate."""


def execute(job: Job, task: Task | None = None) -> dict[str, Any]:
    """The result of a job. ``task`` is given where it exists as an object already."""
    task = task or make_task(job.task.name, job.task.options)
    with quiet():
        return run_of(job, task) if isinstance(job, ArmRun) else cost_of(job, task)


@contextmanager
def quiet() -> Iterator[None]:
    """Advice about small models has been read once; hundreds of runs would repeat it."""
    logger = logging.getLogger('x_transformers')
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            yield
        finally:
            logger.setLevel(level)


def prepared_model(task: Task, flags: Mapping[str, Any], seed: int, device: str, mup_base: int | None = None) -> nn.Module:
    """A model whose parameters have the values that belong to their names, and generators seeded for its training."""
    torch.manual_seed(seed_of('model', seed))
    model = task.model(flags)
    fill_by_name(model, seed)
    if mup_base is not None:
        mup_init_(model, mup_base)
    torch.manual_seed(seed_of('training', seed))
    return model.to(device)


def run_of(run: ArmRun, task: Task) -> dict[str, Any]:
    settings = run.settings
    model = prepared_model(task, run.flags, run.seed, run.device, settings.mup_base if settings.mup else None)
    started, wall = time.process_time(), time.perf_counter()
    curve = train_arm(task, model, settings, run.seed)
    last = [measures for _, measures in curve[-LAST:]]
    value = statistics.fmean(measures[task.metric] for measures in last)
    if not math.isfinite(value):
        raise TrainingError(f'{task.metric} must be a finite number at the end, got {value}. Take a smaller --lr.')
    return {
        'value': value,
        'last': {name: statistics.fmean(measures[name] for measures in last) for name in last[-1]},
        'curve': [
            [step, round_off(measures[task.metric]), round_off(measures.get('loss', math.nan))] for step, measures in curve
        ],
        'seconds': round(time.process_time() - started, 3),
        'wall': round(time.perf_counter() - wall, 3),
    }


def round_off(value: float) -> float | None:
    return float(f'{value:.6g}') if math.isfinite(value) else None


# ---------------------------------------------------------------- cost


def cost_of(job: CostRun, task: Task) -> dict[str, Any]:
    """Processor time per step of the arm and the baseline, in turns, and what a step takes."""
    models = [prepared_model(task, flags, 0, job.device) for flags in (job.base, job.flags)]
    steps = [stepper(task, model, job.settings.lr) for model in models]
    times: list[list[float]] = [[], []]
    for index in range(job.steps + WARM):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            seconds = steps[which](index)
            if index >= WARM:
                times[which].append(seconds)
    return {
        'seconds': [statistics.median(found) for found in times],
        'parameters': [sum(p.numel() for p in model.parameters()) for model in models],
        'flops': [operations(task, model) for model in models],
        'bytes': [step_bytes(task, model) for model in models],
    }


def stepper(task: Task, model: nn.Module, lr: float) -> Callable[[int], float]:
    """A function that does one optimizer step and returns its processor time, or its wall time on another device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    device = next(model.parameters()).device
    clock = time.process_time if device.type == 'cpu' else time.perf_counter

    def step(index: int) -> float:
        batch = on_device(task.batch(0, index), device)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        started = clock()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return clock() - started

    return step


def tokens_of(batch: Any) -> int:
    inputs = getattr(batch, 'inputs', batch)
    while isinstance(inputs, (tuple, list, Mapping)):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    return int(inputs.shape[0] * inputs.shape[1]) if isinstance(inputs, Tensor) and inputs.ndim >= 2 else 1


def operations(task: Task, model: nn.Module) -> float:
    """Floating-point operations of a forward, per token. Fused attention is replaced by products, which can be counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch = on_device(task.batch(0, 0), next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    # with gradients: the counter cannot follow a parameter that is itself the input of a module without them
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        loss_of(model, batch)
    return counter.get_total_flops() / tokens_of(batch)


def step_bytes(task: Task, model: nn.Module) -> int:
    """Bytes that a step holds: weights, gradients, two moments, and what the forward keeps for the backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = on_device(task.batch(0, 0), next(model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, batch)
    total = sum(kept.values()) + 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    del loss
    return total


def one_thread() -> None:
    """Workers take one thread each: more of them would wait for one another."""
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'
