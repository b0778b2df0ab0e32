"""``make gpu`` runs through where there is no GPU, at toy size, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script


@pytest.fixture(scope='module')
def script() -> Any:
    return load_script('benchmarks/gpu.py')


@pytest.mark.slow
def test_it_runs_and_goes_on(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, 'KERNELS', (('sdpa', 'plain'), ('flex', 'softclamp')))
    monkeypatch.setattr(script, 'SAMPLE', {name: script.SAMPLE[name] for name in ('plain', 'softclamp')})
    given = ['--device', 'cpu', '--out', str(tmp_path)]
    assert script.main([*given, '--budget', '0']) == 0
    left = json.loads((tmp_path / 'gpu.json').read_text())
    assert not left['results']
    assert len(left['left']) == 2 * 4 + len(script.KERNELS) + 11
    for part in ('bf16/', 'kernel/', 'sync/', 'train/', 'decode/150M', 'packing,experts'):
        assert script.main([*given, '--only', part]) == 0
    found = json.loads((tmp_path / 'gpu.json').read_text())['results']
    assert found['bf16/softclamp']['good']
    assert found['kernel/sdpa/plain']['good']
    assert 'no backward on CPU' in found['kernel/flex/softclamp']['left_out']
    assert found['train/124M']['tokens_per_second'] > 0
    text = (tmp_path / 'gpu.md').read_text()
    assert 'This is no GPU' in text
    assert '| bf16/plain |' in text


@pytest.mark.deep
def test_all_of_it_runs(script: Any, tmp_path: Path) -> None:
    assert script.main(['--device', 'cpu', '--out', str(tmp_path), '--budget', '3000']) == 0
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert not found['left']
    assert not [name for name, result in found['results'].items() if 'error' in result]
