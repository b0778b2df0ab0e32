"""The commands as they are typed, the report, and the interface for Python."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evidence.own_task import ROWS
from x_transformers.cli import ablate as command
from x_transformers.cli.evidence import row_of, suite_questions
from x_transformers.cli.main import main
from x_transformers.evidence import Task, ablate, estimate
from x_transformers.evidence.execute import prepared_model
from x_transformers.evidence.experiment import BASELINE, Arm, Experiment, Outcome, Question
from x_transformers.evidence.findings import verdict_words
from x_transformers.evidence.page import abbreviated, default_title, forest, frame, ticks
from x_transformers.evidence.plan import arm_of, pairs_of, parsed_value, question, read_plan, split_words
from x_transformers.evidence.report import Report, make_report
from x_transformers.evidence.runs import Settings, TaskName
from x_transformers.evidence.statistics import compare
from x_transformers.evidence.suites import SUITES
from x_transformers.training.errors import TrainingError

OWN = f'{Path(__file__).parent / "own_task.py"}:Line'
SMALL = ['--workers', '0', '--seeds', '2', '--steps', '8', '--evaluations', '2']


def run(capsys: Any, *arguments: str, status: int = 0) -> tuple[str, dict[str, Any]]:
    assert main(['ablate', *arguments]) == status
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def complaint(capsys: Any, *arguments: str, command: str = 'ablate') -> str:
    assert main([command, *arguments]) == 2
    found = capsys.readouterr()
    assert 'Traceback' not in found.err
    return str(found.err).splitlines()[-1]


# ---------------------------------------------------------------- the command


def test_a_command_from_words_to_files(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / 'out'
    arguments = ['--task', OWN, '--idea', 'bias=false', '--idea', 'same: bias=true', '--idea', 'bad: breaks=true', *SMALL]
    text, line = run(capsys, *arguments, '--out', str(out), '--power', '0.1')
    assert {path.name for path in out.iterdir()} == {
        'runs', 'experiment.json', 'results.jsonl', 'table.md', 'forest.png', 'curves.png', 'index.html',
    }  # fmt: skip
    rows = {row['idea']: row for row in line['rows']}
    assert line['command'] == 'ablate'
    assert Path(line['page']).read_text(encoding='utf-8').startswith('<!doctype html>')
    assert set(rows) == {'bias=false', 'same', 'bad'}
    assert rows['same']['verdict'] == 'no difference'
    assert rows['same']['identical']
    assert rows['bad']['verdict'] == 'failed'
    assert 'loss is nan' in rows['bad']['why']
    assert rows['bias=false']['verdict'] in ('helps', 'hurts', 'no difference', 'not resolved')
    for key in (
        'task',
        'metric',
        'baseline',
        'arm',
        'difference',
        'low',
        'high',
        'p',
        'p_holm',
        'seeds',
        'per_second',
        'seconds',
    ):
        assert key in rows['bias=false']
    # a batch of several tensors is timed as it is trained on
    assert rows['bias=false']['per_second'] in ('helps', 'hurts', 'no difference', 'not resolved')
    assert rows['bias=false']['time'] > 0
    assert rows['bias=false']['difference'] == pytest.approx(rows['bias=false']['arm'] - rows['bias=false']['baseline'])
    assert [json.loads(text) for text in (out / 'results.jsonl').read_text().splitlines()] == line['rows']
    assert 'no difference (identical)' in text
    assert line['power'][0]['idea'] == 'bias=false'
    for name in ('forest.png', 'curves.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')
    # once more: nothing is done again, and the numbers are the same
    assert 'Add --resume to continue there' in complaint(capsys, *arguments, '--out', str(out))
    _, again = run(capsys, *arguments, '--out', str(out), '--resume', '--json')
    assert [row | {'seconds': 0} for row in again['rows']] == [row | {'seconds': 0} for row in line['rows']]
    _, more = run(capsys, *arguments, '--out', str(out), '--only', 'failed', '--json')
    assert more['rows'][2]['verdict'] == 'failed'


def test_an_arm_that_only_fails_is_a_row_and_a_status(tmp_path: Path, capsys: Any) -> None:
    _, line = run(capsys, '--task', OWN, '--idea', 'impossible=true', *SMALL, '--out', str(tmp_path / 'a'), '--json', status=1)
    assert line['rows'][0]['verdict'] == 'failed'
    assert 'a line cannot do this' in line['rows'][0]['why']


def test_a_tracker_is_called_with_every_row(tmp_path: Path, capsys: Any) -> None:
    ROWS.clear()
    words = ['--task', OWN, '--idea', 'bias=false', '--idea', 'impossible=true', *SMALL, '--out', str(tmp_path / 'a')]
    _, line = run(capsys, *words, '--tracker', 'tests.evidence.own_task:collect', '--json')
    assert len(ROWS) == 2
    assert json.loads(json.dumps(ROWS, default=list)) == line['rows']


def test_noise_is_the_baseline_against_itself(tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / 'noise')
    _, line = run(capsys, '--task', OWN, '--noise', '--repetitions', '2', *SMALL, '--out', out, '--json')
    rows = {row['idea']: row for row in line['rows']}
    assert set(rows) == {'same seeds', 'other seeds 1', 'other seeds 2'}
    assert rows['same seeds']['identical']
    assert rows['same seeds']['verdict'] == 'no difference'
    assert rows['other seeds 1']['values'] != rows['other seeds 2']['values']
    assert not rows['other seeds 1']['identical']


def test_a_ladder_of_widths(tmp_path: Path, capsys: Any) -> None:
    options = ['--option', 'vocabulary=32,length=16,pairs=2,rows_per_step=4,test_rows=8', '--base', 'dim=8,depth=1']
    arguments = [
        '--task',
        'mqar',
        *options,
        '--idea',
        'shift_tokens=1',
        '--ladder',
        '1,2',
        *SMALL,
        '--out',
        str(tmp_path / 'l'),
    ]
    text, line = run(capsys, *arguments)
    assert [row['task'] for row in line['rows']] == ['mqar (width 8)', 'mqar (width 16)']
    assert re.search(r'mqar: shift_tokens=1 (is not shown to scale|helps at|hurts at)', text)
    assert 'time' in line['rows'][0]


def test_learning_rates_are_chosen_on_seeds_that_no_verdict_uses(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / 'lr'
    arguments = [
        '--task',
        OWN,
        '--idea',
        'bias=false',
        *SMALL,
        '--lr',
        '0.01',
        '--lr-grid',
        '1,10',
        '--out',
        str(out),
        '--json',
    ]
    _, line = run(capsys, *arguments)
    assert line['rows'][0]['lr'] == pytest.approx(0.1)
    options = [json.loads(path.read_text()) for path in out.glob('runs/*/options.json')]
    seeds = {(found['seed'], found['settings']['lr']) for found in options if 'seed' in found}
    assert {seed for seed, _ in seeds} == {0, 1, 10_000, 10_001}
    assert [rate for seed, rate in seeds if seed < 2] == pytest.approx([0.1, 0.1])


def test_a_file_with_tasks_baseline_and_ideas(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / 'ideas.toml'
    path.write_text(f"""
steps = 6
seeds = 2
workers = 0
out = "{tmp_path / 'file'}"
evaluations = 2
[base]
bias = true
[tasks.first]
task = "{OWN}"
[tasks.second]
task = "{OWN}"
lr = 0.1
[ideas.nothing]
bias = false
""")
    _, line = run(capsys, str(path), '--json')
    assert [(row['task'], row['idea'], row['seeds']) for row in line['rows']] == [
        ('first', 'nothing', 2),
        ('second', 'nothing', 2),
    ]


def test_time_is_over_before_it_began(tmp_path: Path, capsys: Any) -> None:
    text, line = run(capsys, '--task', OWN, '--idea', 'bias=false', *SMALL, '--budget', '0s', '--out', str(tmp_path / 'o'))
    assert line['missing'] == 5
    assert line['rows'][0]['verdict'] == 'not resolved'
    assert '5 of 5 runs and timings are missing' in text


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def told(self: Any, job: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Live, 'told', told)
    arguments = ['--task', OWN, '--idea', 'bias=false', *SMALL, '--out', str(tmp_path / 'o')]
    text, line = run(capsys, *arguments, status=130)
    assert line['runs'] == 2
    assert 'Run the same command with --resume to continue' in text
    _, line = run(capsys, *arguments, '--resume', '--json')
    assert line['missing'] == 0


def test_the_bar_spends_little_time_on_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Question(TaskName(OWN), {'bias': True}, Settings(steps=3, lr=0.1), (Arm('x', {'bias': False}),), 2, 'line')
    made = Experiment((asked,), tmp_path)
    live = command.Live(made, 9, silent=False)
    now, looked = 100.0, list[float]()

    def look(self: Any, job: Any) -> str:
        nonlocal now
        looked.append(now)
        now += 0.5
        return ''

    monkeypatch.setattr(command.Live, 'interval_of', look)
    monkeypatch.setattr(command, 'time', SimpleNamespace(monotonic=lambda: now))
    for _ in range(120):
        live.told(made.run(asked, asked.arms[0], 0))
        now += 1.0
    live.bar.close()
    # half a second of looking buys fifty of silence
    assert looked == [100.0, 150.5, 201.0]
    assert live.bar.n == 120


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--task', 'mqra', '--idea', 'shift_tokens=1'], 'Did you mean mqar'),
        (['--task', 'mqar', '--idea', 'shift_token=1'], 'shift_tokens'),
        (['--task', 'mqar', '--idea', 'shift_tokens'], '--idea must be NAME=VALUE'),
        (['--task', 'mqar', '--base', 'depht=1', '--idea', 'shift_tokens=1'], 'depth'),
        (['--task', 'mqar'], '--idea must name at least one idea'),
        (['--idea', 'shift_tokens=1'], '--task must say what to learn'),
        (['nowhere.toml'], 'cannot be read'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--seeds', '0'], '--seeds must be at least 1'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--steps', '0'], 'steps must be at least 1'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--budget', 'soon'], '--budget must be a time'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--shard', '3/2'], '--shard must be I/N'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--ladder', '1,-2'], '--ladder must be above 0'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--lr-grid', 'a'], '--lr-grid must be numbers'),
        (['--task', 'mqar', '--idea', 'shift_tokens=1', '--workers', '-1'], '--workers must be at least 0'),
        (['--task', 'mqar', '--option', 'pears=1', '--idea', 'shift_tokens=1'], 'options of the task mqar must be among'),
        (
            ['--task', 'mqar', '--idea', 'shift_tokens=1', '--only', 'failed', '--out', 'nowhere'],
            '--only failed must have a folder with runs',
        ),
        (['--task', 'mqar', '--option', 'pairs=x', '--idea', 'shift_tokens=1'], "pairs must be a whole number, got 'x'"),
        (['--task', 'mqar', '--option', 'pairs=3.5', '--idea', 'shift_tokens=1'], 'pairs must be a whole number, got 3.5'),
        (['--task', 'missing.py:Task', '--idea', 'shift_tokens=1'], 'must name a file that exists'),
        (['--task', 'mqar', '--noise', '--idea', 'shift_tokens=1'], "--noise must go without --idea, got 'shift_tokens=1'"),
        (['--task', 'mqar', '--repetitions', '2', '--idea', 'shift_tokens=1'], '--repetitions must go with --noise, got 2'),
        (['--task', 'mqar', '--power', '0', '--idea', 'shift_tokens=1'], '--power must be above 0, got 0'),
        (['--task', 'mqar', '--tracker', 'json:no', '--idea', 'shift_tokens=1'], '--tracker must be MODULE:FUNCTION'),
        (['--task', 'mqar', '--device', 'nowhere', '--idea', 'shift_tokens=1'], '--device nowhere cannot be used here'),
        (['--profile', 'quick', '--option', 'pairs=2', '--idea', 'shift_tokens=1'], '--option must go with --task or a file'),
        (['--task', 'mqar', '--data', 'x.txt', '--idea', 'shift_tokens=1'], '--data must go with the task bytes, got mqar'),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys: Any, arguments: list[str], words: str) -> None:
    assert words in complaint(capsys, *arguments)


def test_keys_of_a_file_are_checked(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / 'ideas.toml'
    for text, words in (
        ('stepps = 3', 'Did you mean steps'),
        ('task = 3 3', 'must be a TOML file'),
        ('ideas = 3', 'ideas must be a table'),
        ('[ideas]\nshift = 1', 'must be a table of flags'),
        ('task = "mqar"\n[tasks.two]\ntask = "mqar"', 'got both'),
        ('task = 3', 'task must be a string or a list or a tuple, got 3'),
        ('seeds = "three"', "seeds must be a whole number, got 'three'"),
        ('seeds = 2.5', 'seeds must be a whole number, got 2.5'),
        ('workers = "two"', "workers must be a whole number, got 'two'"),
        ('out = 5', 'out must be a string, got 5'),
        ('tasks.two = 3', 'the task two must be a table, got 3'),
        ('[tasks.two]\ntask = "mqar"\nstep = 4', 'Did you mean steps'),
        ('[tasks.two]\ntask = "mqar"\noptions = 3', 'options of two must be a table, got 3'),
        ('[tasks.two]\ntask = "mqar"\nbase = 3', 'base of two must be a table, got 3'),
    ):
        path.write_text(text)
        assert words in complaint(capsys, str(path))


# ---------------------------------------------------------------- words


def test_words_become_flags() -> None:
    assert parsed_value('true') is True
    assert parsed_value('True') is True
    assert parsed_value('None') is None
    assert parsed_value('3') == 3
    assert parsed_value('0.5') == 0.5
    assert parsed_value('[1, 2]') == (1, 2)
    assert parsed_value('cosine') == 'cosine'
    assert split_words('a=1, b=[1, 2] c="x, y"') == ['a=1', 'b=[1, 2]', 'c="x, y"']
    assert pairs_of(['ff-glu=true,ff_swish=true', 'depth=2'], '--base') == {'ff_glu': True, 'ff_swish': True, 'depth': 2}
    assert arm_of('swiglu: ff_glu=true,ff_swish=true') == Arm('swiglu', {'ff_glu': True, 'ff_swish': True})
    assert arm_of('ff_glu=true') == Arm('ff_glu=true', {'ff_glu': True})


def test_a_plan_holds_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / 'plan.toml'
    path.write_text('task = ["mqar", "bytes"]\nsteps = 5\nseeds = 4\n[base]\ndepth = 1\n[ideas.tuple]\nshift_tokens = [1, 0]\n')
    plan = read_plan(str(path))
    assert [entry['task'] for entry in plan.tasks] == ['mqar', 'bytes']
    assert plan.ideas == (Arm('tuple', {'shift_tokens': (1, 0)}),)
    assert plan.settings == {'steps': 5}
    assert plan.more == {'seeds': 4}


# ---------------------------------------------------------------- reports


def outcome(task: str, idea: str, base: list[float], arm: list[float], **more: Any) -> Outcome:
    found = Outcome(task, idea, {idea: True}, 'accuracy', 'higher', **more)
    found.comparison = compare(base, [arm], margin=0.02)[0]
    found.margin, found.baseline_values, found.values = 0.02, base, arm
    found.baseline, found.arm = sum(base) / len(base), sum(arm) / len(arm)
    return found


def report(folder: Path, tasks: int = 2, ideas: int = 5) -> Report:
    base = [0.5, 0.52, 0.49]
    outcomes = []
    for task in range(tasks):
        for idea in range(ideas):
            arm = [value + 0.02 * (idea - 2) + 0.003 * ((k * idea) % 3) for k, value in enumerate(base)]
            found = outcome(f'task {task}', f'idea <{idea}>', base, arm)
            found.curves = [[[10 * i, value * i / 12, 1.0] for i in range(1, 13)] for value in arm]
            found.cost = {'seconds': [1.0, 1 + idea / 10], 'parameters': [9, 10], 'flops': [1.0, 2.0], 'bytes': [3, 4]}
            outcomes.append(found)
    made = Report(outcomes, folder, 30, 0)
    made.baseline_curves = {f'task {t}': [[[10 * i, 0.04 * i, 1.0] for i in range(1, 13)]] for t in range(tasks)}
    return made


def test_the_page_is_one_file_without_anything_from_elsewhere(tmp_path: Path) -> None:
    text = report(tmp_path).page().read_text(encoding='utf-8')
    assert not re.search(r'(src|href)="(?!#)', text)
    assert 'idea &lt;3&gt;' in text
    assert '<3>' not in text
    assert text.count('<svg') == 6
    assert 'prefers-color-scheme: dark' in text
    assert '@media print' in text
    # paper has no scroll bar under a long command, and a table may go on on the next page, where its head is printed again
    assert re.search(r'pre \{[^}]*white-space: pre-wrap', text)
    assert text.count('<thead><tr>') == text.count('<table>') == 2
    for closed in ('svg', 'table', 'thead', 'tbody', 'section', 'figure', 'tr', 'td', 'div'):
        assert len(re.findall(f'<{closed}[ >]', text)) == text.count(f'</{closed}>'), closed


def test_the_page_counts_parameters_whole(tmp_path: Path) -> None:
    made = report(tmp_path)
    made.outcomes[0].cost = {'seconds': [1.0, 1.0], 'parameters': [29150.0, 29180.0], 'flops': [1.0, 2.0], 'bytes': [3, 4]}
    text = made.page().read_text(encoding='utf-8')
    assert '<td>29,180</td>' in text


def test_what_pairing_removed_is_the_median_of_ideas(tmp_path: Path) -> None:
    made = report(tmp_path, tasks=1, ideas=4)
    for outcome, removed in zip(made.outcomes, (-0.003, 0.9, -0.006, -0.001), strict=True):
        assert outcome.comparison is not None
        outcome.comparison = dataclasses.replace(outcome.comparison, pairing_removed=removed)
    assert 'Pairing removed 0 % of' in made.notes()[0]
    made.outcomes = made.outcomes[:2]
    assert 'Pairing removed 45 % of' in made.notes()[0]
    made.outcomes = made.outcomes[::2]
    removed = made.outcomes[0].comparison
    assert removed is not None
    made.outcomes[0].comparison = dataclasses.replace(removed, pairing_removed=-0.24)
    assert 'Pairing added 24 % to' in made.notes()[0]


def test_a_large_page_is_small(tmp_path: Path) -> None:
    path = report(tmp_path, tasks=4, ideas=40).page()
    assert path.stat().st_size <= 2_000_000


@pytest.mark.parametrize('right', [9.0, 1000.0, 123456.0])
def test_numbers_under_the_right_end_are_whole(right: float) -> None:
    drawn = ''.join(frame(0, 1, 0, right, 480, 300, ('steps', 'accuracy'))[2])
    labels = re.findall(r'x="([\d.]+)" y="276" text-anchor="middle">([^<]+)<', drawn)
    assert len(labels) >= 3
    # digits of 12 pixels are less than 8 wide
    assert all(float(at) + 8 * len(text) / 2 <= 480 for at, text in labels)
    if right == 9.0:
        assert float(labels[-1][0]) == pytest.approx(58 + 410 * 8 / 9, abs=0.1)


def test_one_hopeless_interval_does_not_squeeze_the_others() -> None:
    calm = [outcome('t', f'i{k}', [0.5, 0.52, 0.49], [0.51, 0.53, 0.505]) for k in range(3)]
    wild = outcome('t', 'wild', [0.5, 0.52, 0.49], [0.9, 0.1, 0.5])
    drawn = forest([*calm, wild])
    assert '<path d="M' in drawn  # an arrow where the interval is cut
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]


def test_verdicts_in_words(tmp_path: Path) -> None:
    base = [0.5, 0.52, 0.49]
    assert verdict_words(outcome('t', 'i', base, [v + 0.2 for v in (0.5, 0.521, 0.492)])) == 'helps'
    assert verdict_words(outcome('t', 'i', base, [0.51, 0.531, 0.499])) == 'helps (less than 0.02)'
    assert re.fullmatch(r'not resolved \(needs about \d+ seeds\)', verdict_words(outcome('t', 'i', base, [0.6, 0.5, 0.52])))
    failed = Outcome('t', 'i', {}, 'accuracy', 'higher', failed='it was late')
    assert verdict_words(failed) == 'failed: it was late'
    assert failed.row()['verdict'] == 'failed'


def test_the_reason_of_a_failure_stands_below_the_table(tmp_path: Path) -> None:
    made = report(tmp_path, tasks=1, ideas=2)
    why = 'it was late ' * 20
    made.outcomes.append(Outcome('task 0', 'broken', {}, 'accuracy', 'higher', failed=why))
    *rows, last = made.table().splitlines()
    assert last == f'task 0: broken failed: {why}'
    assert re.search(r'broken .* failed  ', rows[-1])
    assert max(map(len, rows)) < 200
    assert f'failed: {why}' in made.table(markdown=True)


def test_on_a_page_the_reason_of_a_failure_has_the_rest_of_its_row(tmp_path: Path) -> None:
    made = report(tmp_path, tasks=1, ideas=1)
    made.outcomes.append(Outcome('task 0', 'broken', {}, 'accuracy', 'higher', failed='it was late'))
    text = made.page().read_text(encoding='utf-8')
    columns = text.partition('<thead>')[2].partition('</thead>')[0].count('<th')
    assert f'<td>broken</td><td class="word failed" colspan="{columns - 1}">failed: it was late</td></tr>' in text
    assert text.count('<tr>') == text.count('</tr>') == 3


def test_a_timing_that_failed_is_told(tmp_path: Path) -> None:
    arm = Arm('x', {'bias': False})
    asked = Question(TaskName(OWN), {'bias': True}, Settings(steps=3, lr=0.1), (arm, Arm('y')), 2, 'line')
    made = Experiment((asked,), tmp_path)
    job = made.cost(asked, arm)
    made.store.path(job).mkdir(parents=True)
    made.store.write_failure(job, 'the worker was killed by SIGKILL')
    told = [note for note in make_report(made, {}).notes() if 'failed' in note]
    assert told == [
        'line: the timing of x failed: the worker was killed by SIGKILL',
        '1 of 1 runs and timings failed. Add --only failed to repeat them.',
    ]


def test_titles_and_names_on_a_page_can_be_told_apart(tmp_path: Path) -> None:
    made = report(tmp_path, tasks=1, ideas=2)
    assert default_title(made) == 'Do idea <0>, idea <1> help on task 0?'
    made.outcomes[0].idea = 'shift, zero init'
    assert default_title(made) == 'Do shift, zero init; idea <1> help on task 0?'
    assert abbreviated('shift, zero init', 16) == 'shift, zero init'
    assert abbreviated('shift, zero init', 7) == 'shift…'


# ---------------------------------------------------------------- Python


def test_ablate_from_python(tmp_path: Path) -> None:
    from tests.evidence.own_task import Line

    found = ablate(Line(), ideas={'no bias': {'bias': False}, 'same': {}}, seeds=2, out=tmp_path / 'p', lr=0.05)
    assert isinstance(found, Report)
    assert found.verdicts['line', 'same'] == 'no difference'
    assert set(found.verdicts) == {('line', 'no bias'), ('line', 'same')}
    assert 'no bias' in found.table()
    pictures = found.plot()
    assert all(path.exists() for path in pictures)
    again = ablate(Line(), ideas={'no bias': {'bias': False}}, seeds=2, out=tmp_path / 'p', lr=0.05)
    assert again.outcomes[0].values == found.outcomes[0].values
    assert issubclass(Line, Task)


def test_an_object_cannot_go_to_workers(tmp_path: Path) -> None:
    from tests.evidence.own_task import Line

    with pytest.raises(TrainingError, match=r'must be 0 for a task that is an object, got 2\. Give its path'):
        ablate(Line(), ideas={'a': {}}, seeds=1, out=tmp_path, workers=2)


def test_pairing_removes_variance_on_a_real_task(tmp_path: Path) -> None:
    """The same seeds, the same data, the same initial values: what is left differs little."""
    from tests.evidence.own_task import Line

    found = ablate(Line(), ideas={'no bias': {'bias': False}}, seeds=4, out=tmp_path / 'p', lr=0.01)
    comparison = found.outcomes[0].comparison
    assert comparison is not None
    assert comparison.pairing_removed is not None
    assert comparison.pairing_removed > 0.5


# ---------------------------------------------------------------- suites


@pytest.mark.parametrize('name', sorted(SUITES))
def test_suites_can_be_built(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]()
    asked = tuple(
        question(
            {'task': entry.task, 'label': entry.label, 'options': entry.options, 'base': entry.base},
            {},
            (),
            seeds=1,
            settings={'steps': entry.steps, 'lr': entry.lr},
        )
        for entry in suite.entries
    )
    assert Experiment(asked, tmp_path).check() == {}


@pytest.mark.parametrize('name', sorted(SUITES))
def test_rows_of_a_suite_are_different_models(name: str) -> None:
    """A task may set flags that a row does not name: a row without positions had those of the task."""
    found: dict[str, dict[float, str]] = {}
    for asked in suite_questions(SUITES[name](), seeds=1, steps=None):
        few = TaskName(asked.task.name, {**asked.task.options, 'rows_per_step': 2})
        task = dataclasses.replace(asked, task=few).the_task()
        loss = prepared_model(task, asked.base, 0, 'cpu')(task.batch(0, 0)).item()
        losses = found.setdefault(f'{asked.task}', {})
        assert loss not in losses, f'{asked.title} is the same model as {losses[loss]}'
        losses[loss] = asked.title
    assert sum(map(len, found.values())) == len(SUITES[name]().entries)


def test_a_suite_is_shown_beside_published_numbers(tmp_path: Path, capsys: Any) -> None:
    arguments = ['mqar', '--seeds', '2', '--steps', '2', '--workers', '0', '--out', str(tmp_path / 'mqar')]
    assert main(['evidence', *arguments]) == 0
    out = capsys.readouterr().out
    line = json.loads(out.splitlines()[-1])
    assert [row['row'] for row in line['rows']] == [entry.label for entry in SUITES['mqar']().entries]
    assert len(line['rows']) >= 4
    assert line['rows'][0]['published']
    assert all(row['seeds'] == 2 for row in line['rows'])
    assert '0.25' in out
    assert 'suite must be one of' in complaint(capsys, 'mqra', command='evidence')
    nowhere = tmp_path / 'nowhere'
    for words, why in (
        (['--budget', 'soon', '--out', str(nowhere)], '--budget must be a time'),
        (['--workers', '-1', '--out', str(nowhere)], '--workers must be at least 0, got -1'),
        (['--out', str(tmp_path / 'mqar' / 'table.md')], '--out must be a folder that can be written'),
    ):
        assert why in complaint(capsys, 'mqar', *words, command='evidence')
    assert not nowhere.exists()
    assert '--steps must be at least 1, got 0' in complaint(capsys, 'mqar', '--steps', '0', command='evidence')


def test_intervals_of_a_suite_end_where_the_metric_ends(tmp_path: Path) -> None:
    asked, *_ = suite_questions(SUITES['mad'](), seeds=3, steps=None)
    made = Experiment((asked,), tmp_path, costs=False)
    for seed, value in enumerate((0.97, 1.0, 0.99)):
        job = made.run(asked, Arm(BASELINE), seed)
        made.store.path(job).mkdir(parents=True)
        made.store.write_result(job, {'value': value, 'last': {'loss': 1.0}, 'curve': [], 'seconds': 1.0})
    row = row_of(made, asked, {})
    assert row['high'] == 1.0
    assert 0.9 < row['low'] < row['value'] == pytest.approx(0.98667, abs=1e-4)
    # differences of two shares, too: these seeds tell little
    base, wild = [0.1, 0.2], [0.15, 0.9]
    arm = Arm('wild', {'depth': 1})
    pair = dataclasses.replace(asked, arms=(arm,), seeds=2)
    made = Experiment((pair,), tmp_path / 'pair', costs=False)
    for seed in range(2):
        for one, value in ((Arm(BASELINE), base[seed]), (arm, wild[seed])):
            job = made.run(pair, one, seed)
            made.store.path(job).mkdir(parents=True)
            made.store.write_result(job, {'value': value, 'last': {'loss': value}, 'curve': [[1, value, 1.0]], 'seconds': 1.0})
    found = made.outcomes({})[0].row()
    assert (found['low'], found['high']) == (-1.0, 1.0)


def test_profiles_can_be_built(tmp_path: Path) -> None:
    for name in command.PROFILES:
        options = command.parser().parse_args(['--profile', name, '--idea', 'shift_tokens=1'])
        asked, _, _ = command.questions_of(options)
        assert Experiment(asked, tmp_path).check() == {}
        assert len(asked) >= 3


@pytest.mark.parametrize('name', sorted(command.PROFILES))
def test_every_part_of_a_profile_runs(name: str, tmp_path: Path) -> None:
    options = command.parser().parse_args(['--profile', name, '--idea', 'shift_tokens=1', '--steps', '2', '--seeds', '1'])
    asked, _, _ = command.questions_of(options)
    few = {'rows_per_step': 2, 'test_rows': 4}
    small = tuple(dataclasses.replace(q, task=TaskName(q.task.name, {**q.task.options, **few})) for q in asked)
    made = Experiment(small, tmp_path, costs=False)
    made.go()
    outcomes = made.outcomes({})
    assert [outcome.task for outcome in outcomes] == [q.title for q in asked]
    assert all(outcome.failed is None and outcome.comparison is not None for outcome in outcomes)


def test_reports_of_an_unfinished_experiment_say_so(tmp_path: Path) -> None:
    asked = Question(TaskName(OWN), {'bias': True}, Settings(steps=3, lr=0.1), (Arm('x', {'bias': False}),), 2, 'line')
    made = make_report(Experiment((asked,), tmp_path), {})
    assert 'no finished pair of runs' in made.table()
    assert any('are missing' in note for note in made.notes())


# ---------------------------------------------------------------- how long it takes


def test_time_is_that_of_steps_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, 'timed', lambda question: (0.5, 3.0))
    settings = Settings(steps=100, lr=0.1, evaluations=2)
    assert settings.evaluated() == [48, 84, 96, 100]
    asked = Question(TaskName('mqar'), {'dim': 8, 'depth': 1}, settings, (Arm('x', {'heads': 2}),), 3)
    made = Experiment((asked,), tmp_path)
    jobs = made.jobs({})
    # six runs, and thirty steps of the two in turns with two before that are not counted
    whole = 6 * (100 * 0.5 + 4 * 3.0) + 2 * 32 * 0.5
    assert len(jobs) == 7
    assert estimate.estimated_seconds(made, jobs, workers=1) == pytest.approx(whole)
    assert estimate.estimated_seconds(made, jobs, workers=2) == pytest.approx(whole / 2)
    assert estimate.estimated_seconds(made, jobs[:1], workers=0) == pytest.approx(100 * 0.5 + 4 * 3.0)
    own = Question(TaskName(OWN), {'bias': True}, settings, (), 1)
    made = Experiment((own,), tmp_path)
    assert estimate.estimated_seconds(made, made.jobs({}), workers=1) is None


def test_steps_and_evaluations_are_timed(tmp_path: Path) -> None:
    options = {'vocabulary': 16, 'length': 8, 'pairs': 2, 'rows_per_step': 4, 'test_rows': 4}
    tiny, large = (
        estimate.timed(Question(TaskName('mqar', options | more), {'dim': 16, 'depth': 1}, Settings(steps=3, lr=0.1), (), 1))
        for more in ({}, {'rows_per_step': 2048, 'test_rows': 4096})
    )
    assert 0 < tiny[0] < large[0]
    assert 0 < tiny[1] < large[1]


def test_the_time_of_a_profile_is_told_before_it_runs(tmp_path: Path, capsys: Any) -> None:
    words = ['--profile', 'quick', '--idea', 'shift_tokens=1', '--steps', '40', '--budget', '0s', '--workers', '2']
    assert main(['ablate', *words, '--out', str(tmp_path / 'x')]) == 0
    told = capsys.readouterr().err
    assert re.search(r'21 runs and timings to do in \S+, about \d+ (seconds|minutes) with 2 free processors', told)


def test_times_in_words() -> None:
    assert [estimate.in_words(seconds) for seconds in (0.2, 1.2, 40, 89.7, 600, 5399, 9000)] == [
        '1 second', '1 second', '40 seconds', '90 seconds', '10 minutes', '90 minutes', '2.5 hours',
    ]  # fmt: skip
