"""Run what is missing of the atlas, and keep the results in docs/atlas/results.jsonl.

One line per run, named by the hash of its options, so that a fresh clone goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from x_transformers.evidence.experiment import Experiment
from x_transformers.evidence.plan import question, read_plan
from x_transformers.evidence.runs import CostRun, Job, write_text

ROOT = Path(__file__).parent.parent
ATLAS = ROOT / 'docs/atlas'
RESULTS, PLAN = ATLAS / 'results.jsonl', ATLAS / 'atlas.toml'
FOLDER = ROOT / 'runs/atlas'


def experiment(folder: Path = FOLDER, plan_path: Path = PLAN) -> Experiment:
    plan = read_plan(str(plan_path))
    seeds = int(plan.more.get('seeds', 3))
    questions = [question(entry, plan.base, plan.ideas, seeds=seeds, settings=plan.settings) for entry in plan.tasks]
    return Experiment(tuple(questions), folder)


def read_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {line['hash']: line for line in map(json.loads, path.read_text(encoding='utf-8').splitlines())}


def bring_in(atlas: Experiment, jobs: list[Job]) -> None:
    """Put what the repository keeps into the folder of runs."""
    kept = read_results()
    for job in jobs:
        line = kept.get(job.hash)
        if line is not None and not atlas.store.settled(job):
            atlas.store.path(job).mkdir(parents=True, exist_ok=True)
            if 'failed' in line:
                atlas.store.write_failure(job, line['failed'])
            else:
                atlas.store.write_result(job, line['result'])


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """What the comparison takes: of a run its value, the curve of the metric, and the processor time."""
    if 'curve' not in result:
        return {name: [float(f'{value:.4g}') for value in values] for name, values in result.items()}
    curve = [[step, value, None] for step, value, _ in result['curve']]
    return {'value': float(f'{result["value"]:.10g}'), 'last': {}, 'curve': curve, 'seconds': round(result['seconds'], 1)}


def keep(atlas: Experiment, broken: dict[tuple[str, str], str]) -> int:
    """Write every finished run into the repository; the number of lines."""
    kept, today = read_results(), time.strftime('%Y-%m-%d', time.gmtime())
    lines = {}
    for q in atlas.questions:
        for arm in q.everyone():
            if (q.title, arm.name) in broken:
                continue
            jobs: list[Job] = [atlas.cost(q, arm), *(atlas.run(q, arm, seed) for seed in range(q.seeds))]
            for job in jobs:
                result, failure = atlas.store.result(job), atlas.store.failure(job)
                if result is None and failure is None:
                    continue
                about: dict[str, Any] = {'hash': job.hash, 'task': q.title, 'idea': arm.name}
                about |= {'cost': True} if isinstance(job, CostRun) else {'seed': job.seed}
                about |= {'date': kept.get(job.hash, {}).get('date', today)}
                about |= {'result': compact(result)} if result is not None else {'failed': (failure or {})['why']}
                lines[job.hash] = json.dumps(about, separators=(',', ':'))
    write_text(RESULTS, '\n'.join(lines.values()) + '\n')
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--budget', type=float, default=None, help='minutes after which no run begins')
    parser.add_argument('--workers', type=int, default=1)
    options = parser.parse_args()
    atlas = experiment()
    broken = atlas.check()
    for (task, idea), why in broken.items():
        print(f'{task}: {idea} cannot be built: {why}')
    jobs = atlas.jobs(broken)
    bring_in(atlas, jobs)
    missing = [job for job in jobs if not atlas.store.settled(job)]
    print(f'{len(jobs)} runs and timings, {len(missing)} of them missing')
    done, started = 0, time.monotonic()

    def told(job: Job) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f'\r{done} of {len(missing)}, {left / 60:.0f} minutes left', end='', file=sys.stderr, flush=True)
        if done % 25 == 0:
            keep(atlas, broken)

    budget = None if options.budget is None else 60 * options.budget
    try:
        # task by task, so that each is complete before the next one begins; timings when all verdicts are there
        for costs in (False, True):
            for asked in atlas.questions:
                part = Experiment((asked,), atlas.folder, costs=costs)
                left = None if budget is None else budget - (time.monotonic() - started)
                if left is None or left > 0:
                    part.go(workers=options.workers, told=told, budget=left, broken=broken)
    finally:
        print(f'\n{keep(atlas, broken)} lines in {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
