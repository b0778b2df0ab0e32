"""The laws on a device that is not the CPU: what a forward makes must name the device of its tensors."""

from __future__ import annotations

import pytest
import torch

from tests import elsewhere
from tests.laws import laws
from tests.laws.combination import Combination, draw, singles
from tests.laws.sweep import check
from tests.on_device import OnDevice

# autocast and the engine of checkpoints are not told of a device that is pretended; neither are torch's recurrent kernels
LAWS = tuple(law for law in laws.LAWS if law not in (laws.half_precision, laws.checkpoints_agree))
RECURRENT = {'hybrid', 'hybrid_mix', 'hybrid_fold', 'hybrid_mask', 'gate_residual', 'gate_residual_scale'}


def broken(cases: list[Combination]) -> list[str]:
    found = []
    with elsewhere.Elsewhere(), OnDevice(str(elsewhere.device())):
        for case in cases:
            if not case.has(*RECURRENT):
                outcome, why = check(case, LAWS)
                found += [f'{case}: {outcome}: {why}'] if outcome in ('broken', 'crashed') else []
    return found


@pytest.mark.slow
def test_some_combinations_keep_the_laws() -> None:
    assert not broken(draw(4, 20))


@pytest.mark.deep
@pytest.mark.parametrize('part', range(8))
def test_every_flag_keeps_the_laws(part: int) -> None:
    assert not broken(singles()[part::8])


def test_what_lies_on_two_devices_is_refused() -> None:
    with elsewhere.Elsewhere(), OnDevice(str(elsewhere.device())):
        far = torch.ones(3)
        assert far.device.type == elsewhere.NAME
        assert (far + 1).sum().item() == 6
        assert far.cpu().device.type == 'cpu'
        with pytest.raises(RuntimeError, match='lie on two devices'):
            far + torch.ones(3, device='cpu')
