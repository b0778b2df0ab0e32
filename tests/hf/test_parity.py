"""Models of transformers and ours say the same, in both directions."""

from __future__ import annotations

import pytest

from tests.hf.published import CASES, Case, cache_gap, export_gap, greedy, half_gap, import_gap, left_gap

pytest.importorskip('transformers', reason='the models to compare with are those of transformers (extra: dev)')
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_parity(case: Case) -> None:
    theirs, model, gap = import_gap(case)
    assert gap < case.limit
    assert export_gap(theirs, model) < case.limit
    mine, their_own = half_gap(theirs)
    assert mine < 1.5 * their_own
    if not case.writes:
        return
    assert cache_gap(theirs, model) < case.limit
    assert left_gap(theirs, model) < case.limit
    same, ties = greedy(theirs, model)
    assert same or ties > 0
