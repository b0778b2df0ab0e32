"""Runs and their folder: done once, written at once, shared between processes, and the same however often they were killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence.own_task import Line
from x_transformers.evidence.equal_time import at_equal_time, at_step
from x_transformers.evidence.execute import execute, prepared_model
from x_transformers.evidence.experiment import Arm, Experiment, Question, identical
from x_transformers.evidence.model import AnswerModel
from x_transformers.evidence.pool import attempt, death, run_all, sentence
from x_transformers.evidence.report import make_report
from x_transformers.evidence.runs import ArmRun, RunFolder, Settings, TaskName, write_record
from x_transformers.evidence.tasks import make_task
from x_transformers.training.errors import TrainingError

OWN = f'{Path(__file__).parent / "own_task.py"}:Line'
ARMS = (Arm('no bias', {'bias': False}), Arm('same'))


def experiment(folder: Path, *arms: Arm, seeds: int = 3, costs: bool = False, **settings: Any) -> Experiment:
    task = make_task(OWN)
    chosen = Settings(**{'steps': task.steps, 'lr': 0.05, 'evaluations': 3, **settings})
    question = Question(TaskName(OWN), dict(task.flags), chosen, arms or ARMS, seeds, 'line')
    return Experiment((question,), folder, costs=costs)


def numbers(asked: Experiment) -> list[tuple[str, int, float, Any]]:
    """Everything about finished runs that must not depend on chance."""
    question, found = asked.questions[0], []
    for arm in question.everyone():
        for seed in range(question.seeds):
            result = asked.store.result(asked.run(question, arm, seed))
            assert result is not None, asked.store.failure(asked.run(question, arm, seed))
            found.append((arm.name, seed, result['value'], result['curve']))
    return found


# ---------------------------------------------------------------- options and results


def test_the_hash_is_that_of_everything_that_counts(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    question = asked.questions[0]
    run = asked.run(question, question.arms[0], 0)
    assert run.hash == asked.run(question, question.arms[0], 0).hash
    others = [
        asked.run(question, question.arms[0], 1),
        asked.run(question, question.arms[1], 0),
        asked.run(question, question.arms[0], 0, 2.0),
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, steps=7)),
        dataclasses.replace(run, identity={**run.identity, 'version': 2}),
    ]
    assert len({run.hash, *(other.hash for other in others)}) == 6
    # where it is computed does not count
    assert dataclasses.replace(run, device='cuda').hash == run.hash


def test_evaluations_stand_where_the_settings_say() -> None:
    assert Settings(steps=400, lr=1e-3).evaluated() == [40, 80, 120, 160, 200, 240, 280, 320, 360, 380, 390, 400]
    for steps in (1, 2, 3, 7, 99, 1234):
        marks = Settings(steps=steps, lr=1e-3).evaluated()
        assert marks[-1] == steps
        assert marks == sorted(set(marks))
        assert len(marks) <= 15
    with pytest.raises(TrainingError, match='steps must be at least 1'):
        Settings(steps=0, lr=1e-3).check()


def test_a_run_is_judged_by_the_mean_of_its_last_three_evaluations(tmp_path: Path) -> None:
    asked = experiment(tmp_path, seeds=1)
    asked.go()
    result = asked.store.result(asked.run(asked.questions[0], Arm('baseline'), 0))
    assert result is not None
    assert [step for step, _, _ in result['curve']] == asked.questions[0].settings.evaluated()
    assert result['value'] == pytest.approx(sum(point[1] for point in result['curve'][-3:]) / 3, rel=1e-5)


def test_finished_runs_are_not_done_again(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    told: list[Any] = []
    asked.go(told=told.append)
    assert len(told) == 6  # `same` is the baseline: its runs are those of the baseline
    asked.go(told=told.append)
    assert len(told) == 6
    more = experiment(tmp_path, seeds=4)
    more.go(told=told.append)
    assert len(told) == 8


def test_a_result_that_is_written_halfway_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_record(tmp_path / 'result.json', {'value': {1, 2}, 'bad': object()})
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    run = asked.run(asked.questions[0], Arm('baseline'), 0)
    asked.store.path(run).mkdir(parents=True)
    (asked.store.path(run) / 'result.json').write_text('{"value": ')
    with pytest.raises(TrainingError, match='Delete it to do the run again'):
        asked.store.result(run)


# ---------------------------------------------------------------- folders


def test_a_folder_belongs_to_one_experiment(tmp_path: Path) -> None:
    folder = tmp_path / 'runs'
    experiment(folder).open(resume=False)
    with pytest.raises(TrainingError, match='Add --resume to continue there'):
        experiment(folder).open(resume=False)
    experiment(folder).open(resume=True)
    experiment(folder, Arm('other', {'bias': False}), seeds=9).open(resume=True)
    with pytest.raises(TrainingError, match='must hold these tasks, baseline and settings'):
        experiment(folder, steps=7).open(resume=True)
    strange = tmp_path / 'strange'
    strange.mkdir()
    (strange / 'letter.txt').write_text('dear')
    with pytest.raises(TrainingError, match='must be an empty folder'):
        experiment(strange).open(resume=True)
    with pytest.raises(TrainingError, match='must be a folder'):
        experiment(strange / 'letter.txt').open(resume=False)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Each run is done by one of them: whoever comes second to a run goes on to the next and waits at the end."""
    arms = tuple(Arm(f'slow {i}', {'bias': False, 'slow': 0.002 + i / 1000}) for i in range(4))
    numbers_of_processes = []
    for _ in range(2):
        number = os.fork()
        if number == 0:
            try:
                done: list[Any] = []
                asked = experiment(tmp_path, *arms)
                asked.go(told=done.append)
                mine = [job.hash for job in done]
                (tmp_path / f'{os.getpid()}.json').write_text(json.dumps(mine))
                os._exit(0)
            finally:
                os._exit(1)
        numbers_of_processes.append(number)
    assert [os.waitpid(number, 0)[1] for number in numbers_of_processes] == [0, 0]
    assert len(numbers(experiment(tmp_path, *arms))) == 15
    folders = list((tmp_path / 'runs').iterdir())
    assert len(folders) == 15
    assert all({path.name for path in folder.iterdir()} == {'lock', 'options.json', 'result.json'} for folder in folders)


def test_whoever_holds_a_run_keeps_others_from_it(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    run = asked.run(asked.questions[0], Arm('baseline'), 0)
    with asked.store.claim(run) as mine:
        assert mine
        assert attempt(RunFolder(tmp_path), run) == ('busy', '')
    assert attempt(RunFolder(tmp_path), run) == ('done', '')


def test_shards_do_everything_together(tmp_path: Path) -> None:
    told: list[Any] = []
    for part in (1, 2, 3):
        experiment(tmp_path).go(shard=(part, 3), told=told.append)
    assert len(told) == 6
    numbers(experiment(tmp_path))


# ---------------------------------------------------------------- failures


def test_what_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    arms = (
        Arm('grows', {'grows': True}),
        Arm('breaks', {'breaks': True}),
        Arm('impossible', {'impossible': True}),
        Arm('works', {'bias': False}),
    )
    asked = experiment(tmp_path, *arms)
    broken = asked.check()
    asked.go(broken=broken)
    report = make_report(asked, broken)
    why = {outcome.idea: outcome.failed for outcome in report.outcomes}
    assert why['works'] is None
    assert why['grows'] == '3 of 3 runs failed: out of memory'
    assert 'loss is nan' in str(why['breaks'])
    assert 'a line cannot do this' in str(why['impossible'])
    assert report.verdicts['line', 'grows'] == 'failed'
    assert 'out of memory' in report.table()


def test_a_result_that_is_no_number_is_none() -> None:
    class Lost(Line):
        def evaluate(self, model: Any) -> dict[str, float]:
            return {'loss': float('inf')}

    with pytest.raises(TrainingError, match='loss must be a finite number at the end, got inf'):
        execute(ArmRun(TaskName('line'), {'bias': True}, Settings(steps=2, lr=0.1), 0), Lost())


def test_memory_that_torch_does_not_get_is_told_in_few_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert sentence(caught.value) == f'out of memory: it tried to allocate {2**60} bytes'
    on_gpu = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.')
    assert sentence(on_gpu) == 'out of memory: it tried to allocate 2.00 GiB'


def test_a_worker_that_is_killed_takes_only_its_run_with_it(tmp_path: Path) -> None:
    asked = experiment(tmp_path, Arm('dies', {'dies': True}), Arm('works', {'bias': False}), seeds=1)
    asked.go(workers=1)
    report = make_report(asked, {})
    assert 'the worker was killed by SIGKILL' in str(report.outcomes[0].failed)
    assert report.outcomes[1].failed is None
    assert report.outcomes[1].values
    assert 'which the system sends when memory runs out' in str(report.outcomes[0].failed)
    assert death(3) == 'the worker ended with status 3'


def test_failed_runs_are_done_again_when_they_are_forgotten(tmp_path: Path) -> None:
    asked = experiment(tmp_path, seeds=1)
    run = asked.run(asked.questions[0], Arm('baseline'), 0)
    with asked.store.claim(run):
        asked.store.write_failure(run, 'the weather')
    asked.go()
    assert asked.store.failure(run) == {'why': 'the weather'}
    asked.store.forget_failure(run)
    asked.go(only=[run])
    assert asked.store.failure(run) is None
    assert asked.store.result(run) is not None


def test_a_flag_that_nobody_knows_is_told_before_anything_runs(tmp_path: Path) -> None:
    task = make_task('mqar')
    question = Question(TaskName('mqar'), dict(task.flags), Settings(steps=2, lr=1e-3), (Arm('typo', {'shift_token': 1}),), 2)
    with pytest.raises(TrainingError, match='shift_tokens'):
        Experiment((question,), tmp_path).check()
    pair = (Arm('one', {'use_rmsnorm': True}), Arm('two', {'use_rmsnorm': True, 'use_scalenorm': True}))
    question = dataclasses.replace(question, arms=pair)
    assert list(Experiment((question,), tmp_path).check()) == [('mqar', 'two')]
    question = dataclasses.replace(question, arms=(pair[0], pair[0]))
    with pytest.raises(TrainingError, match='different names'):
        Experiment((question,), tmp_path).check()
    assert not (tmp_path / 'runs').exists()


def test_no_run_begins_after_the_budget(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    asked.go(budget=-1.0)
    assert not (tmp_path / 'runs').exists()
    report = make_report(asked, {})
    assert report.missing == 6
    assert report.outcomes[0].verdict == 'not resolved'


# ---------------------------------------------------------------- verdicts of real runs


def test_the_same_flags_are_identical_and_an_unfinished_arm_holds_up_nobody(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    asked.go()
    later = experiment(tmp_path, *ARMS, Arm('later', {'bias': False, 'slow': 0.0}))
    rows = {outcome.idea: outcome for outcome in later.outcomes({})}
    assert rows['same'].comparison is not None
    assert rows['same'].comparison.identical
    assert rows['same'].verdict == 'no difference'
    assert rows['no bias'].comparison is not None
    assert rows['no bias'].comparison.seeds == 3
    assert rows['later'].comparison is None
    assert rows['later'].verdict == 'not resolved'


def test_curves_are_read_between_evaluations() -> None:
    result = {'value': 9.0, 'curve': [[10, 1.0, None], [20, 3.0, None], [30, 5.0, None]]}
    assert at_step(result, 15, 30) == 2.0
    assert at_step(result, 5, 30) == 1.0
    assert at_step(result, 30, 30) == 9.0
    assert not identical(result, None)


@pytest.mark.parametrize('higher', [True, False])
def test_at_equal_time_the_slower_run_is_read_off_its_curve(higher: bool) -> None:
    base = {'value': 5.0, 'curve': [[10, 1.0, None], [20, 3.0, None], [40, 5.0, None]]}
    arm = {'value': 9.0, 'curve': [[10, 2.0, None], [20, 4.0, None], [40, 9.0, None]]}
    sign = 1.0 if higher else -1.0
    # twice as slow, as fast, and twice as fast
    found = at_equal_time([[(base, arm)]] * 3, [2.0, 1.0, 0.5], 40, higher=higher)
    assert found == [[sign * (4.0 - 5.0)], [sign * (9.0 - 5.0)], [sign * (9.0 - 3.0)]]


# ---------------------------------------------------------------- ideas of training


def widths(folder: Path, *arms: Arm, **settings: Any) -> Experiment:
    options = {'vocabulary': 16, 'length': 8, 'pairs': 2, 'rows_per_step': 4, 'test_rows': 16}
    task = make_task('mqar', options)
    chosen = Settings(**{'steps': 6, 'lr': 0.05, 'evaluations': 1, **settings})
    base = {**task.flags, 'dim': 32, 'heads': 2, 'attn_dim_head': 16}
    return Experiment((Question(TaskName('mqar', options), base, chosen, arms, 1),), folder, costs=False)


def test_an_idea_may_be_about_training(tmp_path: Path) -> None:
    arms = (Arm('slower', {'lr': 0.01, 'shift_tokens': 1}), Arm('no decay', {'weight_decay': 0.0}))
    asked = widths(tmp_path, *arms)
    question = asked.questions[0]
    slower, decay = (asked.run(question, arm, 0, 2.0) for arm in arms)
    assert slower.settings == dataclasses.replace(question.settings, lr=0.02)
    assert slower.flags == {**question.base, 'shift_tokens': 1}
    assert decay.settings == dataclasses.replace(question.settings, lr=0.1, weight_decay=0.0)
    assert decay.flags == question.base
    assert decay.hash != asked.run(question, Arm('baseline'), 0, 2.0).hash
    asked.go()
    values = [asked.store.result(asked.run(question, arm, 0)) for arm in question.everyone()]
    assert len({json.dumps(value['curve']) for value in values if value}) == 3
    # a task of one's own may call a flag of its models so
    own = dataclasses.replace(question, base={**question.base, 'lr': 3})
    assert own.settings_of(arms[0]) == question.settings
    assert own.flags_of(arms[0])['lr'] == 0.01


def test_what_all_arms_share_is_no_idea(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r'steps must be the same for all arms, got another value in longer\. Give --steps'):
        widths(tmp_path, Arm('longer', {'steps': 9})).check()
    broken = widths(tmp_path, Arm('x', {'lr': 'fast'}), Arm('y', {'schedule': 'cosinus'}), Arm('z', {'lr': 0.0})).check()
    assert broken['mqar', 'x'] == "--lr must be a number, got 'fast'."
    assert broken['mqar', 'y'] == "--schedule must be cosine or wsd or linear or constant, got 'cosinus'."
    assert broken['mqar', 'z'] == 'lr must be above 0, got 0. Take 1e-3.'
    with pytest.raises(TrainingError, match='--clip must be at least 0'):
        widths(tmp_path, clip=-1.0).check()


def test_mup_changes_nothing_at_its_base_and_old_results_are_found(tmp_path: Path) -> None:
    same, half = Arm('same', {'mup': True, 'mup_base': 32}), Arm('half', {'mup': True, 'mup_base': 16})
    asked = widths(tmp_path, same, half, Arm('heads', {'mup': True, 'mup_base': 24}))
    question = asked.questions[0]
    broken = asked.check()
    assert list(broken) == [('mqar', 'heads')]
    assert 'whole heads' in broken['mqar', 'heads']
    asked.go(broken=broken)
    base, at_base, at_half = (asked.store.result(asked.run(question, arm, 0)) for arm in (Arm('baseline'), same, half))
    assert identical(base, at_base)
    assert not identical(base, at_half)
    # where it is off, the hash knows nothing of it
    assert '"mup' not in json.dumps(asked.run(question, Arm('baseline'), 0).options())
    assert asked.run(question, half, 0).options()['settings']['mup_base'] == 16


def test_mup_starts_and_learns_by_its_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from x_transformers.evidence import training
    from x_transformers.training.mup import shares

    half = Arm('half', {'mup': True, 'mup_base': 16})
    asked = widths(tmp_path, half)
    question, task = asked.questions[0], make_task('mqar', asked.questions[0].task.options)
    plain, scaled = (prepared_model(task, question.base, 0, 'cpu', base) for base in (None, 16))
    factors = {name: shares(plain, 16)[p] for name, p in plain.named_parameters()}
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(after, before * factors[name].init), name
    assert len({factor.init for factor in factors.values()}) > 1
    rates: list[set[float]] = []

    class Watched(training.Trainer):
        def __init__(self, model: Any, *rest: Any, **more: Any) -> None:
            super().__init__(model, *rest, **more)
            rates.append({group['peak'] for optimizer in self.optimizers for group in optimizer.param_groups})

    monkeypatch.setattr(training, 'Trainer', Watched)
    execute(asked.run(question, half, 0), task)
    assert rates == [{0.05 * factor.lr for factor in factors.values()}]
    assert len(rates[0]) > 1


def test_costs_are_those_of_baseline_and_arm_in_turns(tmp_path: Path) -> None:
    task = make_task('mqar', {'vocabulary': 32, 'length': 16, 'pairs': 2, 'rows_per_step': 4, 'test_rows': 8})
    base = {'dim': 16, 'depth': 1, 'heads': 1}
    wide = Arm('wide', {'dim': 64})
    question = Question(TaskName('mqar', {}), base, Settings(steps=4, lr=1e-3), (wide,), 2, made=task)
    asked = Experiment((question,), tmp_path)
    asked.go()
    cost = asked.store.result(asked.cost(question, wide))
    assert cost is not None
    assert cost['parameters'][1] > 4 * cost['parameters'][0]
    assert cost['flops'][1] > 4 * cost['flops'][0]
    assert cost['bytes'][1] > cost['bytes'][0]
    assert all(seconds > 0 for seconds in cost['seconds'])
    row = asked.outcomes({})[0].row()
    assert row['time'] == pytest.approx(cost['seconds'][1] / cost['seconds'][0])
    assert row['per_second'] in ('helps', 'hurts', 'no difference', 'not resolved')


class Flat(torch.nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

    @property
    def linear_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head.weight, self.head.bias

    def forward(self, x: torch.Tensor, return_embeddings: bool = False) -> torch.Tensor:
        assert return_embeddings
        return self.emb(x)


def test_operations_of_a_linear_map_by_hand() -> None:
    from x_transformers.evidence.execute import operations

    task = make_task('mqar', {'vocabulary': 32, 'length': 16, 'pairs': 2, 'rows_per_step': 4})

    model = AnswerModel(Flat())
    # two questions of sixteen places meet the head, 2 x 8 x 32 operations each
    assert operations(task, model) == pytest.approx(2 * 8 * 32 * 2 / 16)


# ---------------------------------------------------------------- killed at any point


def start(folder: Path, workers: int = 0) -> int:
    """A process of its own that does all runs; its number. A fork, for a new interpreter takes seconds to come up."""
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            experiment(folder, seeds=4).go(workers=workers)
            os._exit(0)
        finally:
            os._exit(1)
    return number


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of a fork beside threads, which these processes do not use
def test_killed_twenty_times_the_numbers_are_the_same(tmp_path: Path) -> None:
    undisturbed = experiment(tmp_path / 'whole', seeds=4)
    began = time.monotonic()
    undisturbed.go()
    usual = time.monotonic() - began
    folder, choose, cut, tries = tmp_path / 'killed', random.Random(0), 0, 0
    while cut < 20:
        tries += 1
        assert tries < 200, 'the runs end before they can be killed'
        # once there are workers, which must not outlive their parent; then all is to be done again, so that they have work
        with_workers = cut == 10
        for path in folder.glob('runs/*/result.json') if with_workers else ():
            path.unlink()
        number = start(folder, int(with_workers))
        if with_workers:
            limit = time.monotonic() + 60
            while not any(folder.glob('runs/*/result.json')) and time.monotonic() < limit:
                time.sleep(0.01)
        else:
            time.sleep(choose.uniform(0, 0.6 * usual))
        os.kill(number, signal.SIGKILL)
        cut += os.waitpid(number, 0)[1] == signal.SIGKILL
        # something is undone again each time, so that there is something to kill
        done = sorted(folder.glob('runs/*/result.json'))
        for path in choose.sample(done, len(done) // 2):
            path.unlink()
    number = start(folder)
    assert os.waitpid(number, 0)[1] == 0
    assert numbers(experiment(folder, seeds=4)) == numbers(undisturbed)


@pytest.mark.slow
def test_workers_give_the_numbers_of_this_process(tmp_path: Path) -> None:
    here, there = experiment(tmp_path / 'here'), experiment(tmp_path / 'there')
    here.go()
    there.go(workers=2)
    assert numbers(here) == numbers(there)


def test_run_all_does_nothing_where_all_is_done(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    asked.go()
    run_all(asked.store, asked.jobs({}), workers=3)  # starts no worker: it would take seconds
    lines = [json.loads((path / 'options.json').read_text()) for path in (tmp_path / 'runs').iterdir()]
    assert {line['seed'] for line in lines} == {0, 1, 2}
    assert all(isinstance(run, ArmRun) for run in asked.jobs({}))
