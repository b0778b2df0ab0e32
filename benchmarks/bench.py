"""Compare the speed with a hand-written model: ``make bench``, or ``x-transformers bench``.

Each implementation runs in its own process with one thread. A round runs all of them in turn, and ratios are taken within a
round, so that changes of the machine's speed cancel. Times are processor times. Each feature is compared with our own model
without it, in one process, and printed with its limit.

    --only 'train/*,decode/*'     patterns of workloads
    --other PATH                  a Python interpreter with another x_transformers, to be compared too
    --hf PATH                     a Python interpreter with Hugging Face transformers: models of the same shape
    --rounds N                    at least 5 for published figures
    --out FOLDER                  bench.json and bench.png; a workload that is measured again replaces its row
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MAIN = (
    'train/plain',
    'train/modern',
    'vocab/plain',
    'prefill/plain',
    'prefill/modern',
    'decode/plain/b1',
    'decode/plain/b8',
    'decode/modern/b1',
    'decode/modern/b8',
    # how many times as long a token takes behind 2,016 others as behind 224, which stands where the seconds do
    'growth/plain',
    'growth/modern',
    'encoder/plain',
    'vit/plain',
    'encdec/plain',
    'xl/modern',
    'streams/plain',
)
# how many times as long as the same model without it a training step may take. Those of talking heads and sparse top-k are
# three quarters of what they took in 2.16.1, where the steps were 2.6 and 2.45 times as long as one on fused attention
FEATURES = {
    'feature/alibi': 1.15,
    'feature/t5_bias': 1.15,
    'feature/dynamic_bias': 1.15,
    'feature/mem_kv16': 1.15,
    'feature/value_residual': 1.15,
    'feature/shift_tokens': 1.15,
    'feature/macaron': 1.15,
    'feature/sandwich_norm': 1.15,
    'feature/qk_norm': 1.15,
    'feature/streams4': 1.15,
    'feature/window128': 1.0,
    'feature/softclamp': 1.5,
    'feature/head_sink': 1.5,
    'feature/sigmoid': 1.5,
    'feature/talking_heads': 1.95,
    'feature/sparse_topk8': 1.84,
    # one compiled program beside the eager steps of the same model
    'compiled/plain/b1': 0.87,
    'compiled/modern/b1': 0.87,
}


class Worker:
    def __init__(self, label: str, interpreter: str, kind: str) -> None:
        self.label = label
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        self.process = subprocess.Popen(
            [interpreter, str(HERE / 'worker.py'), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, workload: str, action: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(workload, action, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f'{self.label} failed on {workload}')
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(workers: list[Worker], workload: str, rounds: int) -> dict[str, Any]:
    """Medians of the seconds, and of the ratios to the last worker (the floor) within a round."""
    seconds: dict[str, list[float]] = {worker.label: [] for worker in workers}
    for number in range(rounds):
        turned = workers[number % len(workers) :] + workers[: number % len(workers)]
        for worker in turned:
            answer = worker.ask(workload, 'time')
            if 'seconds' in answer:
                seconds[worker.label].append(answer['seconds'])
    base = seconds[workers[-1].label]
    row: dict[str, Any] = {'workload': workload, 'rounds': rounds, 'load': os.getloadavg()[0]}
    for worker in workers:
        if not seconds[worker.label]:
            continue
        ratios = sorted(own / floor for own, floor in zip(seconds[worker.label], base, strict=True))
        row[worker.label] = {
            'seconds': statistics.median(seconds[worker.label]),
            'ratio': statistics.median(ratios),
            'low': ratios[0],
            'high': ratios[-1],
            **worker.ask(workload, 'memory'),
        }
    return row


def measure_feature(workers: list[Worker], workload: str, rounds: int) -> dict[str, Any]:
    """Medians of the seconds, and of the ratios to the same model without the feature, timed in turn in the same process."""
    row: dict[str, Any] = {'workload': workload, 'rounds': rounds, 'load': os.getloadavg()[0], 'limit': FEATURES[workload]}
    times: dict[str, list[dict[str, float]]] = {worker.label: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            times[worker.label].append(worker.ask(workload, 'time'))
    for worker in workers:
        ratios = sorted(time['seconds'] / time['plain_seconds'] for time in times[worker.label])
        row[worker.label] = {
            'seconds': statistics.median(time['seconds'] for time in times[worker.label]),
            'ratio': statistics.median(ratios),
            'low': ratios[0],
            'high': ratios[-1],
            **worker.ask(workload, 'memory'),
        }
    return row


def feature_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        '| feature | implementation | seconds | ratio to without it (range) | limit | saved MB (without it) | peak MB |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        for label, cell in row.items():
            if not isinstance(cell, dict):
                continue
            spread = f'{cell["ratio"]:.2f} ({cell["low"]:.2f}-{cell["high"]:.2f})'
            saved = f'{cell["saved_mb"]:.0f} ({cell["plain_saved_mb"]:.0f})' if 'saved_mb' in cell else ''
            peak = cell.get('peak_mb')
            told = f'{row["limit"]:.2f}{"" if cell["ratio"] <= row["limit"] else " MISSED"}' if label == 'ours' else ''
            feature = row['workload'].removeprefix('feature/')
            peak = '' if peak is None else f'{peak:.0f}'
            lines.append(f'| {feature} | {label} | {cell["seconds"]:.3f} | {spread} | {told} | {saved} | {peak} |')
    return '\n'.join(lines)


def table(rows: list[dict[str, Any]], labels: list[str]) -> str:
    lines = [
        '| workload | implementation | seconds | ratio (range) | saved MB | peak MB |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        for label in labels:
            cell = row.get(label)
            if cell is None:
                continue
            saved, peak = (f'{cell[key]:.0f}' if cell.get(key) is not None else '' for key in ('saved_mb', 'peak_mb'))
            spread = f'{cell["ratio"]:.2f} ({cell["low"]:.2f}-{cell["high"]:.2f})'
            lines.append(f'| {row["workload"]} | {label} | {cell["seconds"]:.3f} | {spread} | {saved} | {peak} |')
    return '\n'.join(lines)


def draw(rows: list[dict[str, Any]], labels: list[str], path: Path) -> None:
    from x_transformers.drawing import name_beside, panels, save_figure, style

    with style():
        figure, [[axis]] = panels(width=8.5, height=0.35 * len(rows) + 1.5)
        for number, label in enumerate(labels[:-1]):
            known = [index for index, row in enumerate(rows) if label in row]
            heights = [index + 0.3 * number for index in known]
            axis.barh(heights, [rows[index][label]['ratio'] for index in known], 0.28, label=label)
        axis.axvline(1.0, color='black', linewidth=1, label=labels[-1])
        axis.set_yticks(range(len(rows)), [row['workload'] for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel('processor time, as a ratio to the hand-written floor')
        name_beside(axis)
        save_figure(figure, path)


def wanted_of(options: argparse.Namespace) -> list[str]:
    names = (() if options.features else MAIN) + tuple(FEATURES)
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in options.only.split(','))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='*')
    parser.add_argument('--features', action='store_true', help='only the features, each against our own plain model')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--other', help='an interpreter with another x_transformers')
    parser.add_argument('--out', type=Path, default=Path('runs/bench'))
    parser.add_argument('--hf', help='an interpreter with Hugging Face transformers')
    options = parser.parse_args()
    workers = [Worker('ours', sys.executable, 'ours')]
    if options.other:
        workers.append(Worker('other', options.other, 'ours'))
    wanted, competitors = wanted_of(options), list(workers)
    if any(name in MAIN for name in wanted):
        if options.hf:
            workers.append(Worker('transformers', options.hf, 'hf'))
        workers.append(Worker('floor', sys.executable, 'floor'))
    labels = list(dict.fromkeys([*(worker.label for worker in competitors), *(worker.label for worker in workers), 'floor']))
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / 'bench.json'
    # rows of earlier runs stay, so that a table can be made piece by piece
    held = {row['workload']: row for row in json.loads(kept.read_text())} if kept.exists() else {}
    for workload in wanted:
        if workload in FEATURES:
            row = held[workload] = measure_feature(competitors, workload, options.rounds)
            lines = feature_table([row])
        else:
            row = held[workload] = measure(workers, workload, options.rounds)
            lines = table([row], labels)
        print('\n'.join(lines.splitlines()[2:]), flush=True)
        kept.write_text(json.dumps(list(held.values()), indent=1) + '\n')
    rows = [held[name] for name in MAIN if name in held and {'ours', 'floor'} <= held[name].keys()]
    features = [held[name] for name in FEATURES if name in held and 'limit' in held[name]]
    if rows:
        print('\n' + table(rows, labels))
        draw(rows, labels, options.out / 'bench.png')
    if features:
        print('\n' + feature_table(features))
    print(f'\n{platform.machine()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end')


if __name__ == '__main__':
    main()
