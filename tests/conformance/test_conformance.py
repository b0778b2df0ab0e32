"""The recorded cases kept here, or those of the folder named by ``CONFORMANCE``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conformance.replay import Case

FOLDER = Path(os.environ.get('CONFORMANCE') or Path(__file__).parent / 'cases')
CASES = sorted(FOLDER.glob('*.json'))


def test_there_are_cases() -> None:
    assert CASES, f'no recorded case in {FOLDER}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_recorded_behaviour(path: Path) -> None:
    assert Case.load(path).run() == []
