"""The forest plot and the learning curves as pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from x_transformers.drawing import BLUE, GREY, RED, name_beside, panels, save_figure, style
from x_transformers.evidence.findings import Findings, confidence_band
from x_transformers.training.errors import TrainingError

COLOURS = {
    'helps': BLUE,
    'hurts': RED,
    'no difference': GREY,
    'not resolved': '#bbbbbb',
    'failed': '#000000',
}


def styled() -> AbstractContextManager[None]:
    """The style of all pictures.

    Errors: ``TrainingError`` where matplotlib is missing.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise TrainingError("pictures need matplotlib: pip install 'x-transformers[ablate]'")
    return style()


def panels_for(tasks: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    """(figure, one panel for each task, two in a row)."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = panels(rows, columns, width=6.5 * columns, height=height * rows)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    return figure, list(axes.flat[: len(tasks)])


def draw_forest(report: Findings, path: Path) -> Path:
    """Differences with their intervals, one panel per task; to the right is better."""
    with styled():
        return save_figure(forest_plot(report), path)


def forest_plot(report: Findings) -> Any:
    tasks = report.tasks()
    tallest = max(sum(outcome.task == task for outcome in report.outcomes) for task in tasks)
    figure, axes = panels_for(tasks, 1.4 + 0.24 * tallest)
    for axis, task in zip(axes, tasks, strict=True):
        these = [outcome for outcome in report.outcomes if outcome.task == task]
        margin = next((o.margin for o in these if o.margin is not None), None)
        if margin is not None:
            axis.axvspan(-margin, margin, color='#eeeeee', zorder=0)
        axis.axvline(0, color='#444444', linewidth=0.8)
        for place, outcome in enumerate(these):
            found = outcome.comparison
            if found is not None:
                axis.plot([found.low, found.high], [place, place], color=COLOURS[outcome.verdict], linewidth=2)
                axis.plot(found.mean, place, 'o', color=COLOURS[outcome.verdict], markersize=4.5)
        axis.set_yticks(range(len(these)), [outcome.idea for outcome in these])
        axis.set_ylim(len(these) - 0.4, -0.6)
        axis.set_title(f'{task}: {these[0].metric}')
        axis.set_xlabel('better than the baseline by')
    return figure


def draw_curves(report: Findings, path: Path, most: int = 8) -> Path:
    """The metric over steps: mean of the seeds, with a band from the lowest to the highest; the ideas that differ most."""
    with styled():
        return save_figure(curves_of(report, most), path)


def curves_of(report: Findings, most: int) -> Any:
    tasks = report.tasks()
    figure, axes = panels_for(tasks, 3.6)
    for axis, task in zip(axes, tasks, strict=True):
        these = [outcome for outcome in report.outcomes if outcome.task == task and outcome.curves]
        these.sort(key=lambda outcome: -abs(outcome.comparison.mean) if outcome.comparison else 0.0)
        lines = [('baseline', report.baseline_curves.get(task, []))] + [(o.idea, o.curves) for o in these[:most]]
        for name, curves in lines:
            band = confidence_band(curves)
            if not band:
                continue
            steps, means, lows, highs = zip(*band, strict=True)
            style = {'color': '#000000', 'linewidth': 2} if name == 'baseline' else {'linewidth': 1.4}
            (line,) = axis.plot(steps, means, label=name, **style)
            axis.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_title(f'{task}: {report_metric(report, task)}')
        axis.set_xlabel('training steps')
        if axis.lines:
            name_beside(axis)
    return figure


def report_metric(report: Findings, task: str) -> str:
    return next(outcome.metric for outcome in report.outcomes if outcome.task == task)
