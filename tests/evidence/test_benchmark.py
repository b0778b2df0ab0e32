"""The benchmark of `ablate` measures what it says: optimizer steps alone, and what a command prints is read as numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def benchmark_of_evidence() -> ModuleType:
    path = Path(__file__).parents[2] / 'benchmarks' / 'evidence.py'
    spec = importlib.util.spec_from_file_location('benchmark_of_evidence', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_alone_is_as_many_steps_and_no_evaluation(benchmark_of_evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from x_transformers.evidence.tasks.recall import Recall

    monkeypatch.setattr(benchmark_of_evidence, 'one_thread', lambda: None)
    monkeypatch.setattr(Recall, 'evaluate', lambda self, model: pytest.fail('nobody is to look at these models'))
    seen: list[tuple[int, int]] = []
    batch = Recall.batch
    monkeypatch.setattr(Recall, 'batch', lambda self, seed, step: seen.append((seed, step)) or batch(self, seed, step))
    with torch.random.fork_rng():
        cpu, wall = benchmark_of_evidence.training(steps=2, seeds=2)
    assert seen == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1)]
    assert cpu > 0
    assert wall > 0


def test_ratios_are_those_of_measurements_in_turns(benchmark_of_evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_of_evidence, 'in_another_process', lambda words: (0, 0, '{"processor": 10, "wall": 20}'))
    monkeypatch.setattr(benchmark_of_evidence, 'command', lambda steps, seeds, workers: (11.0, 24.0 / workers))
    found = benchmark_of_evidence.overhead(steps=1, seeds=3, pairs=2)
    assert (found['runs'], found['processor'], found['wall']) == (6, pytest.approx(0.1), pytest.approx(0.2))
    assert benchmark_of_evidence.workers(steps=1, seeds=3, pairs=3)['gain'] == pytest.approx(2)
