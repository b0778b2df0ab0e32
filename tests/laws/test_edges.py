"""Every flag at the edges: half precision, adapters, caches of others, masked tokens, overlapping texts."""

from __future__ import annotations

import pytest

from tests.laws.combination import Combination, draw, rotated
from tests.laws.edge_laws import EDGE_LAWS
from tests.laws.test_laws import COUNT, SEED, build_or_refuse

# every group once
ONCE = list({case.names: case for case in reversed(rotated())}.values())


@pytest.mark.parametrize(('number', 'case'), list(enumerate(ONCE)), ids=str)
def test_every_flag_under_some_laws_of_the_edges(number: int, case: Combination) -> None:
    """Each flag under every second law, so that every law sees half of the flags."""
    for law in EDGE_LAWS[number % 2 :: 2]:
        law(case)


@pytest.mark.deep
@pytest.mark.parametrize('case', rotated(), ids=str)
def test_every_flag_under_all_laws_of_the_edges(case: Combination) -> None:
    for law in EDGE_LAWS:
        law(case)


@pytest.mark.deep
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('case', draw(max(COUNT // 4, 20), SEED, most=3), ids=str)
def test_random_combinations_at_the_edges(case: Combination) -> None:
    if build_or_refuse(case):
        for law in EDGE_LAWS:
            law(case)
