"""Experiments: a baseline, ideas and seeds; the runs they need, and the comparison of the results."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from x_transformers.evidence.equal_time import at_equal_time
from x_transformers.evidence.execute import quiet
from x_transformers.evidence.pool import run_all
from x_transformers.evidence.runs import (
    OF_IDEAS,
    ArmRun,
    CostRun,
    Job,
    RunFolder,
    Settings,
    TaskName,
    hash_of,
    read_record,
    refuse_common,
    write_record,
    writing_into,
)
from x_transformers.evidence.statistics import Comparison, compare, margin_of
from x_transformers.evidence.tasks import make_task
from x_transformers.evidence.tasks.base import Task
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.flags.presets import preset, preset_sentences, without_presets, without_usual, word_against
from x_transformers.training.errors import TrainingError
from x_transformers.training.mup import shares

EXPERIMENT = 'experiment.json'
BASELINE = 'baseline'
# the learning rate is chosen on seeds that no verdict uses
SELECTION = 10_000
# seeds of an arm that is the baseline with other initial values and other data
INDEPENDENT = 20_000


@dataclass(frozen=True)
class Arm:
    """An idea: its flags on top of the baseline's."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    other_seeds: int = 0
    """Added to every seed; not 0 only where an arm is to share nothing with the baseline."""


@dataclass(frozen=True)
class Question:
    """One task: the baseline, the ideas, how they are trained."""

    task: TaskName
    base: Mapping[str, Any]
    settings: Settings
    arms: tuple[Arm, ...]
    seeds: int
    label: str = ''
    device: str = 'cpu'
    lr_grid: tuple[float, ...] = ()
    made: Task | None = None
    """The task itself, where there is no name for it."""
    presets: Mapping[str, str] = field(default_factory=dict)
    """The presets that the baseline and the ideas name, by arm."""

    def the_task(self) -> Task:
        return self.made or make_task(self.task.name, self.task.options)

    @property
    def title(self) -> str:
        return self.label or self.task.name

    def flags_of(self, arm: Arm) -> dict[str, Any]:
        own = self.own_settings(arm)
        flags = {**self.base, **{name: value for name, value in arm.flags.items() if name not in own}}
        return without_usual(flags) if self.presets else flags

    def own_settings(self, arm: Arm) -> dict[str, Any]:
        """How this arm is trained otherwise. A task of one's own may have flags of such names: then they are its flags."""
        return {name: value for name, value in arm.flags.items() if name in OF_IDEAS and name not in self.base}

    def settings_of(self, arm: Arm) -> Settings:
        return dataclasses.replace(self.settings, **self.own_settings(arm))

    def explained(self, arm: Arm, error: Exception) -> str:
        """The error, and which of the flags that it names come from a preset."""
        name = self.presets.get(arm.name) or self.presets.get(BASELINE)
        if name is None or not isinstance(error, FlagError):
            return str(error)
        # what an idea says on top of its preset, or of the baseline's, is its own
        flags = {**without_presets(), **self.flags_of(arm)}
        own = {flag for flag, value in preset(name).items() if flags[flag] != value}
        own |= set() if arm.name in self.presets else set(arm.flags)
        return str(FlagError(*error.sentences, *preset_sentences(error, name, own, word_against)))

    def everyone(self) -> tuple[Arm, ...]:
        return (Arm(BASELINE), *self.arms)


@dataclass
class Outcome:
    """One arm of one task, with everything that the report shows."""

    task: str
    idea: str
    flags: dict[str, Any]
    metric: str
    better: str
    baseline: float | None = None
    arm: float | None = None
    margin: float | None = None
    comparison: Comparison | None = None
    per_second: Comparison | None = None
    cost: dict[str, Any] | None = None
    failed: str | None = None
    lr: float | None = None
    baseline_values: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    curves: list[list[list[float]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.failed is not None:
            return 'failed'
        return 'not resolved' if self.comparison is None else self.comparison.verdict

    @property
    def sign(self) -> float:
        return 1.0 if self.better == 'higher' else -1.0

    def row(self) -> dict[str, Any]:
        """As it stands in the JSON line and in results.jsonl. Differences are those of the metric: arm minus baseline."""
        row: dict[str, Any] = {
            'task': self.task,
            'idea': self.idea,
            'flags': self.flags,
            'metric': self.metric,
            'better': self.better,
            'baseline': self.baseline,
            'arm': self.arm,
        }
        found = self.comparison
        if found is not None:
            ends = sorted((self.sign * found.low, self.sign * found.high))
            row |= {'difference': self.sign * found.mean, 'low': ends[0], 'high': ends[1], 'p': found.p, 'p_holm': found.p_holm}
            row |= {'seeds': found.seeds, 'deviation': found.deviation, 'dof': found.dof, 'margin': self.margin}
            row |= {'identical': found.identical, 'smaller_than_margin': found.smaller_than_margin, 'needs': found.needs}
            row |= {'pairing_removed': found.pairing_removed, 'p_sign_flip': found.p_sign, 'bca': found.bca}
        else:
            row |= dict.fromkeys(('difference', 'low', 'high', 'p', 'p_holm')) | {'seeds': 0}
        row |= {'verdict': self.verdict, 'per_second': None, 'seconds': round(self.seconds, 3), 'why': self.failed}
        if self.per_second is not None:
            row['per_second'] = self.per_second.verdict
        if self.cost is not None:
            base, arm = self.cost['seconds']
            row |= {'time': arm / base, 'parameters': self.cost['parameters'][1], 'flops': self.cost['flops'][1]}
            row |= {'bytes': self.cost['bytes'][1]}
        if self.lr is not None:
            row['lr'] = self.lr
        row |= {'baseline_values': self.baseline_values, 'values': self.values}
        return {name: none_for_nan(value) for name, value in row.items()}


def none_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- the experiment


@dataclass
class Experiment:
    """Questions, and the folder in which their runs lie."""

    questions: tuple[Question, ...]
    folder: Path
    costs: bool = True
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each task says of itself."""

    def __post_init__(self) -> None:
        self.store = RunFolder(self.folder)
        self.identities = self.identities or {q.title: q.the_task().options() for q in self.questions}
        if len(self.identities) != len(self.questions):
            titles = ', '.join(q.title for q in self.questions)
            raise TrainingError(f'tasks must have different names, got {titles}. Give each its own.')

    # before anything runs

    def check(self) -> dict[tuple[str, str], str]:
        """Build every model once: why arms cannot be built, by (task, idea).

        Errors: a sentence for settings that make no sense, a flag that does not exist, or a baseline that cannot be built.
        """
        broken: dict[tuple[str, str], str] = {}
        for question in self.questions:
            question.settings.check()
            names = [arm.name for arm in question.everyone()]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise TrainingError(f'ideas must have different names, got {", ".join(twice)} more than once. Rename one.')
            task = question.the_task()
            for arm in question.everyone():
                refuse_common(arm.name, arm.flags, question.base)
                try:
                    settings = question.settings_of(arm)
                    settings.check()
                    with torch.device('meta'), quiet():
                        model = task.model(question.flags_of(arm))
                        if settings.mup:
                            shares(model, settings.mup_base)
                except UnknownFlag as error:
                    raise TrainingError(f'{arm.name}: {error}') from error
                except (FlagError, TrainingError) as error:
                    said = question.explained(arm, error)
                    if arm.name == BASELINE:
                        raise TrainingError(f'the baseline of {question.title} cannot be built: {said}') from error
                    broken[question.title, arm.name] = ' '.join(said.split())
                except Exception:
                    # not every own model can be built without memory; the run itself tells what is wrong
                    continue
        return broken

    def describe(self) -> dict[str, Any]:
        """What must be the same when an experiment goes on; ideas and seeds may be added."""
        return {
            question.title: {
                'task': self.identities[question.title],
                'base': dict(question.base),
                'settings': question.settings.written(),
                'lr_grid': list(question.lr_grid),
            }
            for question in self.questions
        }

    def open(self, resume: bool) -> None:
        """Make the folder, or refuse one that belongs to something else."""
        folder = self.folder
        path = folder / EXPERIMENT
        if folder.exists() and not folder.is_dir():
            raise TrainingError(f'--out must be a folder, got the file {folder}. Choose another one.')
        before = read_record(path)
        wanted = json.loads(json.dumps(self.describe(), default=list))
        if before is not None and before != wanted:
            raise TrainingError(f'--out must hold these tasks, baseline and settings, got {folder} with others. Use another.')
        if before is None and folder.is_dir() and any(folder.iterdir()):
            raise TrainingError(f'--out must be an empty folder, got {folder} with other files. Choose another folder.')
        if before is not None and not resume:
            raise TrainingError(f'--out must be a new folder, got {folder} with these runs. Add --resume to continue there.')
        with writing_into(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_record(path, wanted)

    # runs

    def run(self, question: Question, arm: Arm, seed: int, lr_factor: float = 1.0) -> ArmRun:
        settings = question.settings_of(arm)
        settings = dataclasses.replace(settings, lr=settings.lr * lr_factor)
        identity = self.identities[question.title]
        seed = seed + arm.other_seeds
        return ArmRun(question.task, question.flags_of(arm), settings, seed, question.device, identity)

    def cost(self, question: Question, arm: Arm) -> CostRun:
        identity = self.identities[question.title]
        base, flags = dict(question.base), question.flags_of(arm)
        return CostRun(question.task, base, flags, question.settings, device=question.device, identity=identity)

    def selection_jobs(self, broken: Mapping[tuple[str, str], str]) -> list[Job]:
        """Runs that choose a learning rate per arm."""
        return [
            self.run(question, arm, SELECTION + seed, factor)
            for question in self.questions
            for seed in range(2 if question.lr_grid else 0)
            for factor in question.lr_grid
            for arm in question.everyone()
            if (question.title, arm.name) not in broken
        ]

    def jobs(self, broken: Mapping[tuple[str, str], str]) -> list[Job]:
        """Runs that are judged, seed by seed, so that all arms have the same seeds whenever it stops; costs with the first."""
        found: dict[str, Job] = {}
        for seed in range(max(question.seeds for question in self.questions)):
            for question in self.questions:
                if seed >= question.seeds:
                    continue
                for arm in question.everyone():
                    if (question.title, arm.name) in broken:
                        continue
                    job: Job = self.run(question, arm, seed, self.lr_factor(question, arm))
                    found.setdefault(job.hash, job)
                    if seed == 0 and self.costs and arm.name != BASELINE and not arm.other_seeds:
                        cost = self.cost(question, arm)
                        found.setdefault(cost.hash, cost)
        return list(found.values())

    def lr_factor(self, question: Question, arm: Arm) -> float:
        """The best factor of the grid by the mean over the selection seeds; the middle one where runs are missing."""
        if not question.lr_grid:
            return 1.0
        task, scores = question.the_task(), {}
        for factor in question.lr_grid:
            results = [self.store.result(self.run(question, arm, SELECTION + seed, factor)) for seed in range(2)]
            if all(results):
                scores[factor] = sum(float(result['value']) for result in results if result) / len(results)
        if not scores:
            return question.lr_grid[len(question.lr_grid) // 2]
        pick = max if task.better == 'higher' else min
        return pick(scores, key=scores.__getitem__)

    def go(
        self,
        *,
        workers: int = 0,
        told: Callable[[Job], None] = lambda job: None,
        budget: float | None = None,
        shard: tuple[int, int] = (1, 1),
        broken: Mapping[tuple[str, str], str] | None = None,
        only: Sequence[Job] | None = None,
    ) -> None:
        """Do what is missing, or of it ``only`` these.

        ``budget`` in seconds: no run begins after it. ``shard`` (i, n): the i-th of n parts of the runs.
        """
        deadline = None if budget is None else time.monotonic() + budget
        broken = self.check() if broken is None else broken
        made = self.questions[0].made if len(self.questions) == 1 else None
        if made is not None and workers:
            raise TrainingError(
                f'workers must be 0 for a task that is an object, got {workers}. Give its path, FILE.py:CLASS, in its place.'
            )
        # the learning rates of judged runs are known once those that choose them are done
        for choosing in (True, False) if only is None else (False,):
            jobs = self.selection_jobs(broken) if choosing else self.jobs(broken) if only is None else only
            mine = [job for job in jobs if int(job.hash, 16) % shard[1] == shard[0] - 1]
            run_all(self.store, mine, workers=workers, told=told, deadline=deadline, task=made)

    # results

    def outcomes(self, broken: Mapping[tuple[str, str], str]) -> list[Outcome]:
        return [outcome for question in self.questions for outcome in self.answer(question, broken)]

    def answer(self, question: Question, broken: Mapping[tuple[str, str], str]) -> list[Outcome]:
        """All arms of one task, compared over the seeds that every arm which did not fail has finished."""
        task = question.the_task()
        results: dict[str, list[dict[str, Any] | None]] = {}
        failures: dict[str, str] = {}
        for arm in question.everyone():
            if (question.title, arm.name) in broken:
                failures[arm.name] = broken[question.title, arm.name]
                continue
            runs = [self.run(question, arm, seed, self.lr_factor(question, arm)) for seed in range(question.seeds)]
            results[arm.name] = [self.store.result(run) for run in runs]
            why = [failure['why'] for run in runs if (failure := self.store.failure(run))]
            if why:
                failures[arm.name] = f'{len(why)} of {question.seeds} runs failed: {why[0]}'
        alive = [arm for arm in question.arms if arm.name not in failures]
        if BASELINE in failures:
            failures |= {arm.name: f'the baseline failed: {failures[BASELINE]}' for arm in alive}
            results[BASELINE] = [None] * question.seeds
            alive = []
        # an arm that lags behind, because it was added later or the time was over, does not hold up the others
        counts = {arm.name: sum(result is not None for result in results[arm.name]) for arm in alive}
        usual = sorted(counts.values())[len(counts) // 2] if counts else 0
        alive = [arm for arm in alive if counts[arm.name] >= max(1, usual)]
        everyone = [BASELINE, *(arm.name for arm in alive)]
        common = [seed for seed in range(question.seeds) if all(results[name][seed] is not None for name in everyone)]

        def values(name: str) -> list[float]:
            return [float(result['value']) for seed in common if (result := results[name][seed])]

        base, margin, tables, seconds = values(BASELINE) if common else [], None, [], []
        if common and alive:
            accuracy = task.better == 'higher'
            margin = margin_of(base, accuracy=accuracy)
            same = [all(identical(results[BASELINE][seed], results[arm.name][seed]) for seed in common) for arm in alive]
            arms = [values(arm.name) for arm in alive]
            lowest, highest = task.metric_range()
            limits = {'margin': margin, 'resolution': task.resolution(), 'largest': highest - lowest, 'identical': same}
            tables = compare(base, arms, better=task.better, **limits)  # type: ignore[arg-type]
            seconds = self.per_second(question, results, common, alive, limits)
        found = []
        for arm in question.arms:
            outcome = Outcome(question.title, arm.name, dict(arm.flags), task.metric, task.better)
            outcome.failed = failures.get(arm.name)
            done = [result for result in results.get(arm.name, []) if result]
            outcome.seconds = sum(float(result['seconds']) for result in done)
            if outcome.failed is None and common and arm in alive:
                place = alive.index(arm)
                outcome.comparison, outcome.margin = tables[place], margin
                outcome.per_second = seconds[place] if seconds else None
                outcome.baseline_values, outcome.values = base, values(arm.name)
                outcome.baseline, outcome.arm = sum(base) / len(base), sum(outcome.values) / len(common)
                outcome.curves = [result['curve'] for result in done]
                outcome.cost = None if arm.other_seeds else self.store.result(self.cost(question, arm))
                if question.lr_grid:
                    outcome.lr = question.settings_of(arm).lr * self.lr_factor(question, arm)
            found.append(outcome)
        return found

    def per_second(
        self,
        question: Question,
        results: Mapping[str, list[dict[str, Any] | None]],
        common: Sequence[int],
        alive: Sequence[Arm],
        limits: Mapping[str, Any],
    ) -> list[Comparison]:
        """The comparison at equal processor time; empty as long as a timing is missing."""
        costs = [self.store.result(self.cost(question, arm)) for arm in alive]
        ratios = [cost['seconds'][1] / cost['seconds'][0] for cost in costs if cost]
        if len(ratios) < len(alive):
            return []
        pairs = [[(results[BASELINE][seed] or {}, results[arm.name][seed] or {}) for seed in common] for arm in alive]
        higher = question.the_task().better == 'higher'
        differences = at_equal_time(pairs, ratios, question.settings.steps, higher=higher)
        # each arm has a baseline of its own here: only differences count
        return compare([0.0] * len(common), differences, better='higher', **limits)

    def curves(self, question: Question) -> list[list[list[float]]]:
        """Of the baseline."""
        arm = Arm(BASELINE)
        runs = [self.run(question, arm, seed, self.lr_factor(question, arm)) for seed in range(question.seeds)]
        return [result['curve'] for run in runs if (result := self.store.result(run))]


def identical(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two runs gave the same numbers throughout."""
    return bool(one and other) and one['curve'] == other['curve'] and one['last'] == other['last']  # type: ignore[index]


def folder_name(questions: Sequence[Question]) -> str:
    """A short name that belongs to this experiment."""
    parts = [(q.title, dict(q.base), q.settings.written(), q.the_task().options()) for q in questions]
    tasks = '-'.join(dict.fromkeys(q.task.name.split(':')[-1].replace('/', '-') for q in questions))
    return f'{tasks}-{hash_of({"parts": parts})[:8]}'
