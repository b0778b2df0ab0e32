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

from x_transformers.evidence.experiment import Experiment  # noqa: E402
from x_transformers.evidence.runs import ArmRun  # noqa: E402


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


def test_kept_results_belong_to_the_options_of_today() -> None:
    """What is new in a run's options must leave the names of older runs alone."""
    asked = tool.THE_ATLAS.questions[0]
    made = Experiment((asked,), tool.THE_ATLAS.folder)
    kept = {line['hash'] for line in tool.THE_ATLAS.lines().values() if line['task'] == asked.title and 'seed' in line}
    assert {made.run(asked, arm, seed).hash for arm in asked.everyone() for seed in range(asked.seeds)} >= kept
    assert len(kept) >= 250


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
    first, *others = made.questions
    last, second = first.arms[-1], first.arms[1]
    # of the idea that was added last nothing is known, and it cannot be built for one task
    taken = {arm.name: 9.0 for arm in first.arms[:-1]} | {second.name: 5.0}
    jobs = tool.in_order(made, {(first.title, last.name): 'cannot be built'}, taken, costs=False)
    order = [first.everyone()[0], last, second, *(arm for arm in reversed(first.arms[:-1]) if arm is not second)]
    asked = [(arm, q) for arm in order for q in made.questions if arm is not last or q is not first]
    assert [job.hash for job in jobs] == [made.run(q, arm, seed).hash for arm, q in asked for seed in range(q.seeds)]
    timed = tool.in_order(made, {}, taken, costs=True)
    assert [job.hash for job in timed] == [made.cost(q, arm).hash for arm in order[1:] for q in (first, *others)]


def test_the_time_of_an_idea_is_that_of_its_runs_on_the_first_task(tmp_path: Path) -> None:
    plan = tmp_path / 'two.toml'
    plan.write_text('[tasks.a]\ntask = "mqar"\n[tasks.b]\ntask = "mqar"\n[ideas.x]\nshift_tokens = 1\n')
    about = [('a', 'x', 2.0, 0), ('a', 'x', 3.0, 1), ('b', 'x', 7.0, 0), ('a', 'baseline', 1.0, 0)]
    lines = [
        {'hash': str(i), 'task': task, 'idea': idea, 'seed': seed, 'result': {'seconds': seconds}}
        for i, (task, idea, seconds, seed) in enumerate(about)
    ]
    lines += [{'hash': 'c', 'task': 'a', 'idea': 'x', 'cost': True, 'result': {'seconds': [1.0, 2.0]}}]
    lines += [{'hash': 'f', 'task': 'a', 'idea': 'x', 'seed': 2, 'failed': 'why'}]
    results = tmp_path / 'two.jsonl'
    results.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert tool.time_of_ideas(tool.Kept('two', results, plan)) == {'x': 5.0, 'baseline': 1.0}


def test_a_run_of_several_arms_is_kept_and_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    plan = tmp_path / 'x.toml'
    plan.write_text('task = "mqar"\nsteps = 2\nseeds = 1\n[ideas.same]\ndepth = 1\n[ideas.slow]\nlr = 1e-4\n')
    kept = tool.Kept('x', tmp_path / 'x.jsonl', plan)
    made = kept.experiment()
    for job in made.jobs({}):
        timing = {'seconds': [1.0, 1.5], 'parameters': [1, 1], 'flops': [1.0, 1.0], 'bytes': [1, 1]}
        measured = {'value': 0.5, 'last': {'loss': 1.0}, 'curve': [[2, 0.5, 1.0]], 'seconds': 1.0}
        made.store.path(job).mkdir(parents=True)
        made.store.write_result(job, measured if isinstance(job, ArmRun) else timing)
    # the baseline, which is the idea that changes nothing, too; the slow one; a timing of both
    assert tool.keep(kept, made, {}) == 3
    same, slow = kept.as_shown().outcomes({})
    assert same.row()['identical']
    assert (same.row()['time'], slow.row()['time']) == (1.5, 1.5)
    assert slow.comparison is not None
