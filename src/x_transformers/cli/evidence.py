"""``x-transformers evidence``: a published suite of tasks, with our results beside the published ones."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from x_transformers.cli.ablate import Live, check_at_least, seconds_of
from x_transformers.evidence.experiment import BASELINE, Arm, Experiment, Question
from x_transformers.evidence.findings import number
from x_transformers.evidence.plan import question
from x_transformers.evidence.runs import write_text
from x_transformers.evidence.statistics import t_quantile
from x_transformers.evidence.suites import SUITES, Suite
from x_transformers.training.errors import TrainingError

ABOUT = """Train our Transformer on a published suite of tasks; show the result, with its interval, beside published numbers.

The sizes are reduced to what two cores do in an hour or less; the command says how.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser('x-transformers evidence', description=ABOUT)
    add = made.add_argument
    add('suite', help=', '.join(SUITES))
    add('--seeds', type=int, default=3, help='seeds per row (3)')
    add('--steps', type=int, help='optimizer steps; else those of the suite')
    add('--workers', type=int, default=1, help='processes of one thread each (1); 0: in this process')
    add('--out', help='folder of the runs; else below runs/evidence; what is finished in it is not done again')
    add('--budget', metavar='TIME', help='30m, 2h, 90s: no run begins after this time')
    add('--json', action='store_true', help='print nothing but the JSON line')
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
        half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        row |= {'low': row['value'] - half, 'high': row['value'] + half}
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
    asked = suite_questions(suite, check_at_least(options.seeds, 1, '--seeds'), options.steps)
    folder = Path(options.out or f'runs/evidence/{options.suite}')
    experiment = Experiment(asked, folder, costs=False)
    broken = experiment.check()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = experiment.jobs(broken)
    missing = sum(not experiment.store.settled(job) for job in jobs)
    if not options.json:
        print(f'{suite.about} {suite.paper}\n{suite.reduced}\n{missing} runs to do in {folder}', file=sys.stderr)
    live, stopped = Live(experiment, missing, options.json), False
    try:
        workers = check_at_least(options.workers, 0, '--workers')
        experiment.go(workers=workers, told=live.told, budget=seconds_of(options.budget), broken=broken)
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
        if stopped:
            print('stopped; what was finished is kept, the same command goes on')
    value = {'command': 'evidence', 'suite': options.suite, 'folder': str(folder), 'mean': mean}
    print(json.dumps({**value, 'published_mean': dict(suite.mean), 'reduced': suite.reduced, 'rows': rows}))
    return 130 if stopped else 0
