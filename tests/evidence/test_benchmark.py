"""The benchmark of `ablate` measures what it says: optimizer steps alone, and what a command prints is read as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.scripts import load_script
from x_transformers.position.relative import RelativePositionBias


@pytest.fixture
def benchmark_of_evidence() -> Any:
    return load_script('benchmarks/evidence.py')


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
    monkeypatch.setattr(benchmark_of_evidence, 'command', lambda steps, seeds, workers: (11.0, 24.0 / workers, [4.0, 5.0]))
    found = benchmark_of_evidence.overhead(steps=1, seeds=3, pairs=2)
    assert (found['runs'], found['processor'], found['wall']) == (6, pytest.approx(0.1), pytest.approx(0.2))
    assert benchmark_of_evidence.workers(steps=1, seeds=3, pairs=3)['gain'] == pytest.approx(2)


def test_the_share_of_a_command_is_that_of_its_own_steps(benchmark_of_evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_of_evidence, 'command', lambda steps, seeds, workers: (10.0, 0.0, [4.0, 6.0]))
    monkeypatch.setattr(benchmark_of_evidence, 'evaluating', lambda steps: 0.2)
    assert benchmark_of_evidence.share(steps=1, seeds=1, pairs=2)['processor'] == pytest.approx(10 / 8 - 1)


def test_evaluations_are_counted(benchmark_of_evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_of_evidence, 'one_thread', lambda: None)
    monkeypatch.setattr(benchmark_of_evidence, 'timed', lambda question: (0.5, 2.0))
    # 12 evaluations of two seconds beside 400 steps of half a second
    assert benchmark_of_evidence.evaluating(400) == pytest.approx(24 / 224)


def test_what_a_bias_starts_from_is_shrunk() -> None:
    module = load_script('benchmarks/start_of_bias.py')
    bias = RelativePositionBias(scale=3.0, causal=True, heads=2)
    before = bias.relative_attention_bias.weight.detach().clone()
    module.shrink(torch.nn.Sequential(bias), 0.5)
    assert torch.equal(bias.relative_attention_bias.weight, before / 2)
    with pytest.raises(ValueError, match='must have a T5 bias'):
        module.shrink(torch.nn.Linear(2, 2), 0.5)
