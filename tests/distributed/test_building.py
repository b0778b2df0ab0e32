"""A stage is built with the numbers of one process, and never holds the layers of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.laws.combination import Combination, singles
from x_transformers.distributed.building import build_stage
from x_transformers.distributed.stages import leave_elsewhere, staged_refusals

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')


@pytest.mark.parametrize('stage', [0, 1])
def test_a_stage_has_the_numbers_of_one_process(stage: int) -> None:
    cases = [*singles('decoder')[::8], Combination.parse('encoder+attn_pool_deep')]
    assert compare(cases, stage) > 0.8 * len(cases)


@pytest.mark.deep
@pytest.mark.parametrize('stage', [0, 1])
def test_a_stage_has_the_numbers_of_one_process_under_every_flag(stage: int) -> None:
    cases = [case for case in singles() if case.kind != 'crosser']
    assert compare(cases, stage) > 0.8 * len(cases)


def compare(cases: list[Combination], stage: int) -> int:
    """How many models have layers that a stage lets go of."""
    tried = 0
    for case in cases:
        torch.manual_seed(3)
        whole: Any = case.fresh()
        drawn = torch.get_rng_state()
        if any(staged_refusals(whole, 2)):
            continue
        torch.manual_seed(3)
        part: Any = build_stage(case.fresh, stage, 2)
        assert torch.equal(torch.get_rng_state(), drawn), case
        # as it is built, before anything else is let go of
        gone = {name for name, parameter in part.named_parameters() if parameter.is_meta}
        leave_elsewhere(part, part, stage, 2)
        leave_elsewhere(whole, whole, stage, 2)
        mine, its = dict(part.named_parameters()), dict(whole.named_parameters())
        assert list(mine) == list(its), case
        for name, parameter in mine.items():
            assert parameter.is_meta == its[name].is_meta, (case, name)
            assert parameter.requires_grad == its[name].requires_grad, (case, name)
            assert parameter.is_meta or torch.equal(parameter, its[name]), (case, name)
        of_layers = {name for name in its if its[name].is_meta and name.startswith('attn_layers.layers.')}
        assert of_layers <= gone, case
        tried += bool(of_layers)
    return tried


def test_layers_of_others_are_let_go_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Combination.parse('decoder+no_abs')
    held: list[int] = []
    made: list[Any] = []
    import x_transformers.layers.stack as room

    def counted(*args: Any, make: Any = room.make_layer) -> Any:
        held.append(sum(not p.is_meta for layer in made for p in layer.parameters()))
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(room, 'make_layer', counted)
    part: Any = build_stage(lambda: case.fresh(stack={'depth': 6}), 1, 2)
    half = len(part.attn_layers.layers) // 2
    # the first time on the meta device, then without the first half
    assert held[: 2 * half] == [0] * (2 * half)
    assert held[2 * half : 3 * half + 1] == [0] * (half + 1)
    assert held[-1] > 0
