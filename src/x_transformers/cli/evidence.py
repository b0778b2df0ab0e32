"""``x-transformers evidence``: a published suite of tasks, with our results beside the published ones."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from x_transformers.cli.ablate import Live, amount, check_at_least, seconds_of
from x_transformers.evidence.experiment import BASELINE, Arm, Experiment, Question
from x_transformers.evidence.findings import number
from x_transformers.evidence.plan import question
from x_transformers.evidence.runs import write_text, writing_into
from x_transformers.evidence.statistics import mean_interval
from x_transformers.evidence.suites import SUITES, Suite
from x_transformers.training.errors import TrainingError

ABOUT = """Train our Transformer on a suite of tasks for which others have published results.
Print our results, with 95 % intervals over seeds, beside the published ones.

The sizes are reduced so that two processor cores take less than an hour. The command prints how they are reduced.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        'x-transformers evidence', description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add('suite', help=', '.join(SUITES))
    add('--seeds', type=int, default=3, help='number of seeds for each row (default 3)')
    add('--steps', type=int, help='optimizer steps of a run (default: those of the suite)')
    add('--workers', type=int, default=1, help='number of processes, one thread each (default 1). 0 runs all in this process')
    add('--out', help='folder for the runs (default: one below runs/evidence). Finished runs in it are not repeated')
    add('--budget', metavar='TIME', help='start no run after this time: 90s, 30m, 2h')
    add('--json', action='store_true', help='print only the line of JSON')
    return made


def suite_questions(suite: Suite, seeds: int, steps: int | None) -> tuple[Question, ...]:
    found = []
    for entry in suite.entries:
        values = {'task': entry.task, 'label': entry.label, 'options': entry.options, 'base': entry.base}
        settings = {'steps': steps or entry.steps, 'lr': entry.lr}
        found.append(question(values, {}, (), seeds=seeds, settings=settings))
    return tuple(found)


def row_of(experiment: Experiment, asked: Question, published: Any) -> dict[str, Any]:
    """Mean and 95 % interval of the seeds that are finished."""
    task = asked.the_task()
    runs = [experiment.run(asked, Arm(BASELINE), seed) for seed in range(asked.seeds)]
    results = [result for run in runs if (result := experiment.store.result(run))]
    failures = [failure['why'] for run in runs if (failure := experiment.store.failure(run))]
    values = [float(result['value']) for result in results]
    row: dict[str, Any] = {'row': asked.title, 'task': asked.task.name, 'metric': task.metric, 'seeds': len(values)}
    row |= {'value': statistics.fmean(values) if values else None, 'low': None, 'high': None, 'values': values}
    if len(values) > 1:
        row |= dict(zip(('low', 'high'), mean_interval(values, task.metric_range()), strict=True))
    row |= {
        'exact': statistics.fmean(r['last']['exact'] for r in results) if results and 'exact' in results[0]['last'] else None
    }
    row |= {'published': dict(published), 'seconds': sum(float(result['seconds']) for result in results)}
    return row | {'why': failures[0] if failures else None}


def table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    head = ('row', 'metric', 'ours', '95 % interval', 'published', 'seeds', 'seconds a run')
    lines = [head]
    for row in rows:
        interval = '–' if row['low'] is None else f'{number(row["low"], 3)} … {number(row["high"], 3)}'
        published = '; '.join(f'{value:g} ({source})' for source, value in row['published'].items()) or '–'
        ours = number(row['value']) if row['why'] is None else f'failed: {row["why"]}'
        seconds = f'{row["seconds"] / row["seeds"]:.0f}' if row['seeds'] else '–'
        lines.append((row['row'], row['metric'], ours, interval, published, str(row['seeds']), seconds))
    if markdown:
        written = ['| ' + ' | '.join(line) + ' |' for line in lines]
        return '\n'.join([written[0], '|' + ' --- |' * len(head), *written[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    if options.suite not in SUITES:
        raise TrainingError(f'the suite must be one of {", ".join(SUITES)}, got {options.suite!r}. Choose one of them.')
    suite = SUITES[options.suite]()
    steps = None if options.steps is None else check_at_least(options.steps, 1, '--steps')
    asked = suite_questions(suite, check_at_least(options.seeds, 1, '--seeds'), steps)
    workers, budget = check_at_least(options.workers, 0, '--workers'), seconds_of(options.budget)
    folder = Path(options.out or f'runs/evidence/{options.suite}')
    experiment = Experiment(asked, folder, costs=False)
    broken = experiment.check()
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = experiment.jobs(broken)
    missing = sum(not experiment.store.settled(job) for job in jobs)
    if not options.json:
        instead = '' if steps is None else f' With --steps {steps}, every run has {amount(steps, "step")} in their place.'
        print(f'{suite.about} {suite.paper}\n{suite.reduced}{instead}\n{missing} runs to do in {folder}', file=sys.stderr)
    live, stopped = Live(experiment, missing, options.json), False
    try:
        experiment.go(workers=workers, told=live.told, budget=budget, broken=broken)
    except KeyboardInterrupt:
        stopped = True
    finally:
        live.bar.close()
    rows = [row_of(experiment, q, entry.published) for q, entry in zip(asked, suite.entries, strict=True)]
    text = table(rows, markdown=True) + f'\n\n{suite.reduced}\n'
    write_text(folder / 'table.md', text)
    finished = [row['value'] for row in rows]
    mean = statistics.fmean(finished) if suite.mean and None not in finished else None
    if not options.json:
        print(table(rows))
        if mean is not None:
            print(f'mean {number(mean)}; published ' + '; '.join(f'{v:g} ({source})' for source, v in suite.mean.items()))
        left = sum(not experiment.store.settled(job) for job in jobs)
        if left and not stopped:
            print(f'{left} of {len(jobs)} runs are missing. Run the same command to do them.')
        if stopped:
            print('Stopped. Finished runs are kept. Run the same command to continue.')
    value = {'command': 'evidence', 'suite': options.suite, 'folder': str(folder), 'mean': mean}
    print(json.dumps({**value, 'published_mean': dict(suite.mean), 'reduced': suite.reduced, 'rows': rows}))
    return 130 if stopped else 0
