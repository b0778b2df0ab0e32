"""Run what is missing of the experiments whose results the documentation shows, and keep the results beside it.

An experiment is a file: docs/atlas/atlas.toml, docs/recipes/NAME.toml; or a suite of `x-transformers evidence`. Its results are
kept with one line per run, named by the hash of its options, so that a fresh clone goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from x_transformers.cli.evidence import suite_questions
from x_transformers.evidence.experiment import BASELINE, Experiment, Question
from x_transformers.evidence.plan import Plan, question, read_plan
from x_transformers.evidence.runs import CostRun, Job, write_text
from x_transformers.evidence.suites import SUITES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
ATLAS, RECIPES, EVIDENCE = DOCS / 'atlas', DOCS / 'recipes', DOCS / 'evidence'


@dataclass(frozen=True)
class Kept:
    """An experiment and where its results are kept."""

    name: str
    results: Path
    plan_path: Path | None = None

    @cached_property
    def plan(self) -> Plan:
        if self.plan_path is None:
            raise TypeError(f'{self.name} is a suite, and has no file.')
        return read_plan(str(self.plan_path))

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        if self.plan_path is None:
            return suite_questions(SUITES[self.name](), seeds=3, steps=None)
        seeds = int(self.plan.more.get('seeds', 3))
        base, ideas, settings = self.plan.base, self.plan.ideas, self.plan.settings
        return tuple(question(entry, base, ideas, seeds=seeds, settings=settings) for entry in self.plan.tasks)

    @property
    def folder(self) -> Path:
        return ROOT / 'runs' / ('atlas' if self.name == 'atlas' else f'kept/{self.name}')

    def experiment(self) -> Experiment:
        return Experiment(self.questions, self.folder, costs=self.plan_path is not None)

    def lines(self) -> dict[str, dict[str, Any]]:
        """What is kept, by hash."""
        if not self.results.exists():
            return {}
        return {line['hash']: line for line in map(json.loads, self.results.read_text(encoding='utf-8').splitlines())}

    def as_shown(self) -> Experiment:
        """The experiment with the kept results in the place of a folder of runs."""
        # what a task says of itself may take reading a corpus, and tells nothing here
        identities = {q.title: {'task': q.title} for q in self.questions}
        made = Experiment(self.questions, self.folder, identities=identities)
        jobs: dict[str, tuple[str, str, int | None]] = {}
        for q in self.questions:
            for arm in reversed(q.everyone()):  # where flags are equal, the baseline's runs are those of both
                jobs[made.cost(q, arm).hash] = q.title, arm.name, None
                jobs |= {made.run(q, arm, seed).hash: (q.title, arm.name, seed) for seed in range(q.seeds)}
        made.store = ByName(self.lines(), jobs)  # type: ignore[assignment]
        return made


class ByName:
    """Results by what they are of, and not by hash: the bytes of another Python have another one."""

    def __init__(self, lines: Mapping[str, dict[str, Any]], jobs: dict[str, tuple[str, str, int | None]]) -> None:
        self.jobs = jobs
        self.lines = {(line['task'], line['idea'], line.get('seed')): line for line in lines.values()}

    def line(self, job: Job) -> dict[str, Any]:
        return self.lines.get(self.jobs.get(job.hash, ('', '', None)), {})

    def result(self, job: Job) -> dict[str, Any] | None:
        return self.line(job).get('result')

    def failure(self, job: Job) -> dict[str, Any] | None:
        return {'why': self.line(job)['failed']} if 'failed' in self.line(job) else None


def recipes() -> list[Kept]:
    return [Kept(path.stem, path.with_suffix('.jsonl'), path) for path in sorted(RECIPES.glob('*.toml'))]


def suites() -> list[Kept]:
    return [Kept(name, EVIDENCE / f'{name}.jsonl') for name in SUITES]


THE_ATLAS = Kept('atlas', ATLAS / 'results.jsonl', ATLAS / 'atlas.toml')


def everything() -> dict[str, Kept]:
    found = [THE_ATLAS, *recipes()]
    return {kept.name: kept for kept in found} | {f'evidence/{kept.name}': kept for kept in suites()}


def bring_in(kept: Kept, made: Experiment, jobs: list[Job]) -> None:
    """Put what the repository keeps into the folder of runs."""
    lines = kept.lines()
    for job in jobs:
        line = lines.get(job.hash)
        if line is not None and not made.store.settled(job):
            made.store.path(job).mkdir(parents=True, exist_ok=True)
            if 'failed' in line:
                made.store.write_failure(job, line['failed'])
            else:
                made.store.write_result(job, line['result'])


def compact(result: dict[str, Any], curve: bool) -> dict[str, Any]:
    """What the pages take: of a run its value, the curve where times are compared, and the processor time."""
    if 'curve' not in result:
        return {name: [float(f'{value:.4g}') for value in values] for name, values in result.items()}
    points = [point[:2] for point in result['curve']] if curve else []  # pages draw the metric, and no loss
    last = {} if curve else {name: float(f'{value:.4g}') for name, value in result['last'].items()}
    return {'value': float(f'{result["value"]:.10g}'), 'last': last, 'curve': points, 'seconds': round(result['seconds'], 1)}


def keep(kept: Kept, made: Experiment, broken: Mapping[tuple[str, str], str]) -> int:
    """Write every finished run into the repository; the number of lines."""
    before, today = kept.lines(), time.strftime('%Y-%m-%d', time.gmtime())
    lines = {}
    for q in made.questions:
        for arm in q.everyone():
            if (q.title, arm.name) in broken:
                continue
            jobs: list[Job] = [made.cost(q, arm), *(made.run(q, arm, seed) for seed in range(q.seeds))]
            for job in jobs:
                result, failure = made.store.result(job), made.store.failure(job)
                if result is None and failure is None:
                    continue
                about: dict[str, Any] = {'hash': job.hash, 'task': q.title, 'idea': arm.name}
                about |= {'cost': True} if isinstance(job, CostRun) else {'seed': job.seed}
                about |= {'date': before.get(job.hash, {}).get('date', today)}
                about |= {'result': compact(result, made.costs)} if result is not None else {'failed': (failure or {})['why']}
                # one run may be that of several arms: it is that of the first, as in ``as_shown``
                lines.setdefault(job.hash, json.dumps(about, separators=(',', ':')))
    kept.results.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept.results, ''.join(line + '\n' for line in lines.values()))
    return len(lines)


def time_of_ideas(kept: Kept) -> dict[str, float]:
    """Seconds that the runs of each idea took on the first task, as far as they are kept."""
    first, found = kept.questions[0].title, dict[str, float]()
    for line in kept.lines().values():
        if line['task'] == first and 'seed' in line and 'result' in line:
            found[line['idea']] = found.get(line['idea'], 0.0) + line['result']['seconds']
    return found


def in_order(made: Experiment, broken: Mapping[tuple[str, str], str], taken: Mapping[str, float], costs: bool) -> list[Job]:
    """Idea by idea through all tasks: where time runs out, rows are whole or not there.

    Ideas of which nothing is known come first, those that were added last at their head; then those that took little time.
    """
    names = list(dict.fromkeys(arm.name for q in made.questions for arm in q.everyone()))[::-1]
    found: list[Job] = []
    for name in sorted(names, key=lambda name: (name != BASELINE, taken.get(name, 0.0))):
        for q in made.questions:
            for arm in q.everyone():
                if arm.name != name or (q.title, name) in broken:
                    continue
                if not costs:
                    found += [made.run(q, arm, seed) for seed in range(q.seeds)]
                elif name != BASELINE:
                    found.append(made.cost(q, arm))
    return found


def complete(kept: Kept, workers: int, budget: float | None) -> None:
    """Do what is missing; ``budget`` in seconds."""
    made = kept.experiment()
    broken = made.check()
    for (task, idea), why in broken.items():
        print(f'{task}: {idea} cannot be built: {why}')
    jobs = made.jobs(broken)
    bring_in(kept, made, jobs)
    missing = [job for job in jobs if not made.store.settled(job)]
    print(f'{kept.name}: {len(jobs)} runs and timings, {len(missing)} of them missing')
    done, started = 0, time.monotonic()

    def told(job: Job) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f'\r{done} of {len(missing)}, {left / 60:.0f} minutes left', end='', file=sys.stderr, flush=True)
        if done % 25 == 0:
            keep(kept, made, broken)

    try:
        # timings when all verdicts are there
        for costs in (False, True) if made.costs else (False,):
            left = None if budget is None else budget - (time.monotonic() - started)
            if left is None or left > 0:
                only = in_order(made, broken, time_of_ideas(kept), costs)
                made.go(workers=workers, told=told, budget=left, broken=broken, only=only)
    finally:
        print(f'\n{keep(kept, made, broken)} lines in {kept.results.relative_to(ROOT)}')


def main() -> None:
    known = everything()
    parser = argparse.ArgumentParser(description=__doc__)
    sets = {'recipes': [kept.name for kept in recipes()], 'evidence': [f'evidence/{kept.name}' for kept in suites()]}
    words = [*known, *sets]
    parser.add_argument('names', nargs='+', choices=words, metavar='NAME', help=', '.join(words))
    parser.add_argument('--budget', type=float, default=None, help='minutes after which no run begins')
    parser.add_argument('--workers', type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    for name in (one for word in options.names for one in sets.get(word, [word])):
        left = None if options.budget is None else max(0.0, 60 * options.budget - (time.monotonic() - started))
        complete(known[name], options.workers, left)


if __name__ == '__main__':
    main()
