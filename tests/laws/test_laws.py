"""Every flag alone and random combinations of up to six, under every law."""

from __future__ import annotations

import os

import pytest

from tests.laws.combination import Combination, draw, singles
from tests.laws.laws import LAWS
from x_transformers.flags.base import FlagError

SEED = int(os.environ.get('LAWS_SEED', '2161'))
COUNT = int(os.environ.get('LAWS_COUNT', '200'))


def build_or_refuse(case: Combination) -> bool:
    """True if the combination is accepted; a refusal must be a ``FlagError`` from a constructor."""
    try:
        case.build()
    except FlagError as refusal:
        return len(str(refusal)) <= 20  # a refusal must say more than that
    return True


@pytest.mark.parametrize('case', singles(), ids=str)
def test_every_flag_alone(case: Combination) -> None:
    if not build_or_refuse(case):
        pytest.fail(f'{case} is refused, though it is one idea with all that it needs')
    for law in LAWS:
        law(case)


@pytest.mark.parametrize('case', draw(COUNT, SEED), ids=str)
def test_random_combinations(case: Combination) -> None:
    if not build_or_refuse(case):
        return
    for law in LAWS:
        law(case)
