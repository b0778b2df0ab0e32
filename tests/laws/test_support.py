"""docs/support.json says what the laws find: run `python -m tests.laws.support` and `make docs` if one of these fails."""

from __future__ import annotations

import json

import pytest

from tests.laws.groups import GROUPS
from tests.laws.support import PATH, found, written


def test_every_flag_with_a_law_is_told() -> None:
    assert list(json.loads(PATH.read_text(encoding='utf-8'))) == [
        entry.name for entry in GROUPS if entry.flags or entry.wrapper
    ]


@pytest.mark.slow
@pytest.mark.deep
def test_what_is_told_is_what_the_laws_find() -> None:
    assert PATH.read_text(encoding='utf-8') == written(found())
