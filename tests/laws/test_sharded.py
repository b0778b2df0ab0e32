"""FSDP2 over two processes, one unit per layer, gives the loss and the gradients of one process."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import rotated
from tests.laws.sharded import attempt
from tests.two_processes import attempt_all, with_modes

SOME = ['kv_heads', 'streams', 't5', 'residual_attn', 'lime', 'layer_dropout', 'deep_embed', 'dynamic_tanh', 'tied', 'sink']

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')


@pytest.mark.slow
def test_layers_are_sharded() -> None:
    done, failed = attempt_all(attempt, with_modes([f'decoder+{name}' for name in SOME], ['layers', 'layers+again']))
    assert not failed, '\n'.join(failed)
    assert done == 2 * len(SOME)


@pytest.mark.deep
def test_every_flag_is_sharded() -> None:
    cases = [str(case) for case in rotated()]
    done, failed = attempt_all(attempt, with_modes(cases, ['root', 'layers', 'layers+again']))
    assert not failed, '\n'.join(failed)
    assert done == 3 * len(cases)
