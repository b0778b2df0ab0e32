"""The atlas: its page is that of the results that are kept, and a run of it can be done again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import generate_atlas  # noqa: E402
import kept as tool  # noqa: E402


def test_page_and_picture_are_current() -> None:
    page, picture = generate_atlas.generated()
    assert page == generate_atlas.PAGE.read_text(encoding='utf-8'), 'run `python tools/generate_atlas.py`'
    assert picture == generate_atlas.PICTURE.read_text(encoding='utf-8')
    rows = re.findall(r'^\| .* \|$', page.partition('## Ideas')[2], re.MULTILINE)
    ran = [row for row in rows if '| not run |' not in row and '---' not in row and not row.startswith('| task |')]
    assert picture.count('<g>') == len(ran)


def test_every_idea_is_named_and_can_be_run_again() -> None:
    page = generate_atlas.PAGE.read_text(encoding='utf-8')
    asked = tool.THE_ATLAS.plan
    assert len(asked.ideas) >= 40
    assert len(asked.tasks) == 4
    for arm in asked.ideas:
        assert f'### {arm.name}\n' in page
        assert f'x-transformers ablate docs/atlas/atlas.toml --select {arm.name}`' in page
    assert {idea for _, idea, *_ in generate_atlas.PUBLIC} <= {arm.name for arm in asked.ideas}


def test_results_are_compact_and_say_nothing_of_where_they_were_made() -> None:
    text = tool.THE_ATLAS.results.read_text(encoding='utf-8')
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(text) < 400 * len(lines)
    assert len({line['hash'] for line in lines}) == len(lines)
    assert not re.search(r'"/|\.py|home|tmp', text)
    assert all(re.fullmatch(r'\d{4}-\d\d-\d\d', line['date']) for line in lines)


@pytest.mark.slow
def test_a_run_of_the_atlas_gives_the_numbers_that_are_kept() -> None:
    """The first one of a task that depends on no files."""
    from x_transformers.evidence.execute import execute

    made = tool.THE_ATLAS.experiment()
    asked = made.questions[0]
    job = made.run(asked, asked.everyone()[0], 0)
    kept = tool.THE_ATLAS.lines()[job.hash]['result']
    found = execute(job)
    assert found['value'] == pytest.approx(kept['value'], abs=0.02)


def test_rows_are_whole_where_time_runs_out() -> None:
    made = tool.THE_ATLAS.as_shown()
    asked = made.questions[0]
    broken = {(asked.title, asked.arms[-1].name): 'cannot be built'}
    jobs = tool.in_order(made, asked, broken, costs=False)
    order = [asked.everyone()[0], *reversed(asked.arms[:-1])]
    assert [(job.flags, job.seed) for job in jobs] == [
        (asked.flags_of(arm), seed) for arm in order for seed in range(asked.seeds)
    ]
    timed = tool.in_order(made, asked, broken, costs=True)
    assert [job.flags for job in timed] == [asked.flags_of(arm) for arm in order[1:]]
