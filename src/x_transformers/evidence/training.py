"""Training of a task with the package's trainer, in memory: the same steps for every arm, evaluations at the set steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from x_transformers.evidence.draws import seed_of
from x_transformers.evidence.runs import Settings
from x_transformers.evidence.tasks.base import Task
from x_transformers.training.trainer import Trainer

Curve = list[tuple[int, dict[str, float]]]


def train_arm(task: Task, model: nn.Module, settings: Settings, seed: int) -> Curve:
    """(finished steps, measures) of every evaluation."""
    wanted = set(settings.evaluated())

    def evaluate(model: nn.Module, step: int) -> Mapping[str, float]:
        return task.evaluate(model) if step in wanted else {}

    short = dataclasses.replace(settings, warmup=min(settings.warmup, settings.steps // 2))
    options = short.trainer_options(seed=seed_of('training', seed) % 2**31, val_every=settings.unit)
    trainer = Trainer(model, lambda step: task.batch(seed, step), options, evaluate=evaluate)
    history = trainer.train()
    return [
        (int(values['step']), {name: float(value) for name, value in values.items() if name != 'step'})
        for values in history.evaluations
        if len(values) > 1
    ]
