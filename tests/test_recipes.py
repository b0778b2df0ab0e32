"""Recipes and suites: their tables are those of the results that are kept, and every preset that they measure is in them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import generate_recipes  # noqa: E402
import kept as tool  # noqa: E402

from x_transformers.evidence.suites import SUITES  # noqa: E402
from x_transformers.flags.presets import PRESETS  # noqa: E402


def test_pages_are_current() -> None:
    made = generate_recipes.blocks()
    for page in generate_recipes.PAGES.values():
        text = page.read_text(encoding='utf-8')
        assert generate_recipes.filled(text, made) == text, 'run `python tools/generate_recipes.py`'


def test_every_recipe_and_suite_has_its_table() -> None:
    recipes, evidence = (page.read_text(encoding='utf-8') for page in generate_recipes.PAGES.values())
    names = {kept.name for kept in tool.recipes()}
    assert len(names) >= 5
    assert set(re.findall(r'<!-- recipe ([\w-]+) -->', recipes)) == names
    assert set(re.findall(r'<!-- suite ([\w-]+) -->', evidence)) == set(SUITES)
    for name in names:
        assert f'x-transformers ablate docs/recipes/{name}.toml' in recipes
    for name in PRESETS:
        assert f'| `{name}` |' in recipes


@pytest.mark.parametrize('kept', [*tool.recipes(), *tool.suites()], ids=lambda kept: kept.name)
def test_results_are_compact_and_belong_to_what_is_asked(kept: tool.Kept) -> None:
    lines = list(kept.lines().values())
    known = {(q.title, arm.name) for q in kept.questions for arm in q.everyone()}
    assert {(line['task'], line['idea']) for line in lines} <= known
    assert all(line['seed'] < q.seeds for line in lines if 'seed' in line for q in kept.questions if q.title == line['task'])
    text = kept.results.read_text(encoding='utf-8') if lines else ''
    assert len(text) <= 700 * len(lines)
    assert not re.search(r'"/|\.py|home|tmp', text)
    if lines:
        json.dumps(kept.as_shown().jobs({})[0].options())


def test_a_published_number_outside_of_the_interval_is_told_with_what_is_known() -> None:
    row = {'row': 'a task', 'low': 0.2, 'high': 0.4, 'published': {'one': 0.3, 'two': 0.5}}
    assert generate_recipes.difference(row, '') == (
        '* a task: published 0.5 lies outside our interval. Beside the reduced sizes, we do not know why.'
    )
    both = row | {'published': {'one': 0.1, 'two': 0.5}}
    assert (
        generate_recipes.difference(both, 'It is easier.')
        == '* a task: published 0.1, 0.5 lie outside our interval. It is easier.'
    )
    assert generate_recipes.difference(row | {'published': {'one': 0.3}}, 'It is easier.') == ''
    assert generate_recipes.difference(row | {'low': None}, '') == ''
