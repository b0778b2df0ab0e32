"""Models around a stack under their laws, and generation with random combinations of flags."""

from __future__ import annotations

import os

import pytest

from tests.laws.combination import Combination
from tests.laws.test_laws import COUNT, SEED, build_or_refuse
from tests.laws.wrapper_laws import WRAPPER_LAWS, Wrapped, draw_generating, draw_wrapped, generates

PART = int(os.environ.get('LAWS_WRAPPERS', str(COUNT // 5)))


@pytest.mark.parametrize('case', draw_wrapped(PART, SEED), ids=str)
def test_wrappers(case: Wrapped) -> None:
    for law in WRAPPER_LAWS:
        law(case)


@pytest.mark.parametrize('case', draw_generating(PART, SEED), ids=str)
def test_generation(case: Combination) -> None:
    if build_or_refuse(case):
        generates(case)
