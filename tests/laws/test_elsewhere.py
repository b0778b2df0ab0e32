"""The laws on a device that is not the CPU: what a forward makes must name the device of its tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
REFUSED = """
import torch
from tests.on_device import enter
enter('elsewhere')
far = torch.ones(3)
assert far.device.type == 'elsewhere' and far.cpu().device.type == 'cpu'
assert (far + 1).sum().item() == 6
try:
    far + torch.ones(3, device='cpu')
except RuntimeError as error:
    assert 'lie on two devices' in str(error)
    print('refused')
"""


def run(*arguments: str) -> str:
    """In a process of its own: a device must be known before the first way back."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_some_combinations_keep_the_laws() -> None:
    said = run('-m', 'tests.laws.sweep', '--device', 'elsewhere', '--count', '4', '--seed', '20')
    assert 'kept' in said.splitlines()[-1]


@pytest.mark.deep
@pytest.mark.parametrize('kind', ['decoder', 'encoder', 'cross', 'prefix', 'crosser'])
def test_every_flag_keeps_the_laws(kind: str) -> None:
    run('-m', 'tests.laws.sweep', '--device', 'elsewhere', '--singles', '--part', kind)


def test_what_lies_on_two_devices_is_refused() -> None:
    assert run('-c', REFUSED) == 'refused\n'
