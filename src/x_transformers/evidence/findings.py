"""The findings of an experiment, as a table and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x_transformers.evidence.experiment import Outcome
from x_transformers.evidence.statistics import seeds_for

WORDS = {
    'helps': 'helps',
    'hurts': 'hurts',
    'no difference': 'no difference above {margin}',
    'not resolved': 'not resolved',
    'failed': 'failed',
}


def number(value: float | None, digits: int = 4) -> str:
    return '–' if value is None or not math.isfinite(value) else f'{value:.{digits}g}'


def signed(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return '–'
    return '0' if value == 0 else f'{value:+.{digits}g}'.replace('-', '−')


def probability(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return '–'
    return '<0.0001' if value < 1e-4 else f'{value:.4f}' if value < 0.1 else f'{value:.2f}'


def verdict_words(outcome: Outcome) -> str:
    """The verdict as a reader is told it."""
    if outcome.failed is not None:
        return f'failed: {outcome.failed}'
    found = outcome.comparison
    if found is None:
        return 'not resolved (no finished pair of runs)'
    if found.identical:
        return 'no difference (identical)'
    words = WORDS[found.verdict].format(margin=number(outcome.margin, 2))
    if found.verdict == 'not resolved':
        needs = 'more than 10,000' if found.needs is None else f'about {max(found.needs, found.seeds + 1)}'
        return f'{words} (needs {needs} seeds)' if found.seeds > 1 else f'{words} (one seed has no interval)'
    if found.smaller_than_margin:
        words += f' (less than {number(outcome.margin, 2)})'
    return words


def confidence_band(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) over seeds."""
    found = []
    for points in zip(*curves, strict=False):
        values = [point[1] for point in points if point[1] is not None]
        if values:
            found.append((points[0][0], sum(values) / len(values), min(values), max(values)))
    return found


@dataclass
class Findings:
    """Outcomes of all arms. ``rows`` are what the JSON line holds."""

    outcomes: list[Outcome]
    folder: Path
    runs: int
    missing: int
    about: dict[str, Any] = field(default_factory=dict)
    baseline_curves: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    baselines: dict[str, list[float]] = field(default_factory=dict)
    untimed: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why the timing of a (task, idea) failed."""
    failures: int = 0
    """Runs and timings that failed."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [outcome.row() for outcome in self.outcomes]

    @property
    def verdicts(self) -> dict[tuple[str, str], str]:
        """The verdict of each (task, idea)."""
        return {(outcome.task, outcome.idea): outcome.verdict for outcome in self.outcomes}

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(outcome.task for outcome in self.outcomes))

    def table(self, markdown: bool = False) -> str:
        """One line per idea: baseline, difference with its 95 % interval, verdicts per step and per second, costs."""
        head = (
            *('task', 'idea', 'metric', 'baseline', 'idea’s', 'difference', '95 % interval'),
            *('p (Holm)', 'verdict', 'at equal time', 'time', 'seeds'),
        )
        lines = [head, *(self.cells(outcome) for outcome in self.outcomes)]
        if markdown:
            rows = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines]
            return '\n'.join([rows[0], '|' + ' --- |' * len(head), *rows[1:]])
        # the reason of a failure is a sentence, and would make its column as wide: it stands below
        failed = [f'{o.task}: {o.idea} failed: {o.failed}' for o in self.outcomes if o.failed is not None]
        lines = [tuple('failed' if cell.startswith('failed: ') else cell for cell in line) for line in lines]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        rows = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return '\n'.join([*rows, *failed])

    @staticmethod
    def cells(outcome: Outcome) -> tuple[str, ...]:
        row = outcome.row()
        interval = '–' if row.get('low') is None else f'{signed(row["low"])} … {signed(row["high"])}'
        return (
            outcome.task,
            outcome.idea,
            outcome.metric,
            number(outcome.baseline),
            number(outcome.arm),
            signed(row.get('difference')),
            interval,
            probability(row.get('p_holm')),
            verdict_words(outcome),
            outcome.per_second.verdict if outcome.per_second else '–',
            f'{row["time"]:.2f} ×' if 'time' in row else '–',
            str(row['seeds']),
        )

    def notes(self) -> list[str]:
        """What is to be said beside the table: the noise, what pairing removed, what the ladder shows, what is missing."""
        lines = []
        for task in self.tasks():
            these = [outcome for outcome in self.outcomes if outcome.task == task]
            base = next((o.baseline_values for o in these if o.baseline_values), [])
            if len(base) > 1:
                mean = sum(base) / len(base)
                sigma = math.sqrt(sum((value - mean) ** 2 for value in base) / (len(base) - 1))
                margin = next((o.margin for o in these if o.margin is not None), None)
                removed = [c.pairing_removed for o in these if (c := o.comparison) and c.pairing_removed is not None]
                line = f'{task}: the baseline is {mean:.4g} with σ = {sigma:.2g} over {len(base)} seeds.'
                line += f' Differences below δ = {number(margin, 2)} are too small to matter.'
                if removed:
                    middle = round(100 * statistics.median(removed))
                    effect = f'removed {middle} % of' if middle >= 0 else f'added {-middle} % to'
                    line += f' Pairing {effect} the variance of differences (median of ideas).'
                lines.append(line)
        for (task, idea), why in self.untimed.items():
            lines.append(f'{task}: the timing of {idea} failed: {why}')
        if self.failures:
            lines.append(f'{self.failures} of {self.runs} runs and timings failed. Add --only failed to repeat them.')
        lines += self.scale_notes()
        if self.missing:
            every = self.runs + self.missing
            lines.append(f'{self.missing} of {every} runs and timings are missing. Add --resume to do them.')
        return lines

    def scale_notes(self) -> list[str]:
        """Whether two widths agree, for experiments with a ladder."""
        ladder = self.about.get('ladder') or {}
        lines = []
        for task, labels in ladder.items():
            if len(labels) < 2:
                continue
            for idea in dict.fromkeys(outcome.idea for outcome in self.outcomes):
                found = [o for o in self.outcomes if o.idea == idea and o.task in labels]
                signs = {o.verdict for o in found}
                if signs in ({'helps'}, {'hurts'}):
                    lines.append(f'{task}: {idea} {signs.pop()} at {len(found)} widths.')
                else:
                    lines.append(f'{task}: {idea} is not shown to scale: {", ".join(f"{o.task}: {o.verdict}" for o in found)}.')
        return lines

    def power(self, difference: float) -> list[dict[str, Any]]:
        """Seeds that would find ``difference``, for each idea at the spread that it showed."""
        count: dict[str, int] = {}
        for outcome in self.outcomes:
            count[outcome.task] = count.get(outcome.task, 0) + 1
        found = []
        for outcome in self.outcomes:
            if outcome.comparison and outcome.comparison.seeds > 1 and not outcome.comparison.identical:
                deviation = outcome.comparison.deviation
                seeds = seeds_for(difference, deviation, arms=count[outcome.task])
                found.append({'task': outcome.task, 'idea': outcome.idea, 'deviation': deviation, 'seeds': seeds})
        return found
