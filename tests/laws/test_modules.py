"""Every flag under the laws of modules: hooks, foreign blocks, wrappers that run layers again."""

from __future__ import annotations

import pytest

from tests.laws.combination import Combination, rotated
from tests.laws.module_laws import (
    BLOCKS,
    MODULE_LAWS,
    foreign_block_runs,
    hooks_fire,
    hooks_fire_again,
)

EVERY = rotated()
# every group once
ONCE = list({case.names: case for case in reversed(EVERY)}.values())


@pytest.mark.parametrize('case', ONCE, ids=str)
def test_hooks_fire(case: Combination) -> None:
    hooks_fire(case)


@pytest.mark.parametrize('case', ONCE[::4], ids=str)
def test_hooks_fire_again_under_checkpointing(case: Combination) -> None:
    hooks_fire_again(case)


@pytest.mark.parametrize(('number', 'case'), list(enumerate(ONCE[::2])), ids=str)
def test_foreign_blocks_run(number: int, case: Combination) -> None:
    foreign_block_runs(case, BLOCKS[number % len(BLOCKS)])


@pytest.mark.deep
@pytest.mark.parametrize('case', EVERY, ids=str)
def test_all_laws_of_modules(case: Combination) -> None:
    for law in MODULE_LAWS:
        law(case)
