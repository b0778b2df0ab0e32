"""FSDP2 over two processes, one unit per layer, gives the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.laws.combination import rotated
from tests.laws.sharded import run

SOME = ['kv_heads', 'streams', 't5', 'residual_attn', 'lime', 'layer_dropout', 'deep_embed', 'dynamic_tanh', 'tied', 'sink']

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')


@pytest.mark.slow
def test_layers_are_sharded(tmp_path: Path) -> None:
    done, failed = run([f'decoder+{name}' for name in SOME], ['layers', 'layers+again'], str(tmp_path / 'found'))
    assert not failed, '\n'.join(failed)
    assert done == 2 * len(SOME)


@pytest.mark.deep
def test_every_flag_is_sharded(tmp_path: Path) -> None:
    cases = [str(case) for case in rotated()]
    done, failed = run(cases, ['root', 'layers', 'layers+again'], str(tmp_path / 'found'))
    assert not failed, '\n'.join(failed)
    assert done == 3 * len(cases)
