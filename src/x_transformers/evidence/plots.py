"""The forest plot and the learning curves as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from x_transformers.evidence.findings import Findings, confidence_band
from x_transformers.training.errors import TrainingError

# for readers who do not tell red from green
COLOURS = {
    'helps': '#0072b2',
    'hurts': '#d55e00',
    'no difference': '#777777',
    'not resolved': '#bbbbbb',
    'failed': '#000000',
}


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise TrainingError("pictures need matplotlib: pip install 'x-transformers[ablate]'") from error
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f'.{path.name}')
    figure.savefig(temporary, dpi=160, bbox_inches='tight', format='png')
    temporary.replace(path)
    return path


def draw_forest(report: Findings, path: Path) -> Path:
    """Differences with their intervals, one panel per task; to the right is better."""
    plt, tasks = pyplot(), report.tasks()
    tallest = max(sum(outcome.task == task for outcome in report.outcomes) for task in tasks)
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (6.5 * columns, rows * (1.4 + 0.24 * tallest))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
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
        axis.set_yticks(range(len(these)), [outcome.idea for outcome in these], fontsize=8)
        axis.set_ylim(len(these) - 0.4, -0.6)
        axis.set_title(f'{task}: {these[0].metric}', fontsize=10, loc='left')
        axis.set_xlabel('better than the baseline by', fontsize=8)
        axis.tick_params(axis='x', labelsize=8)
        axis.spines[['top', 'right']].set_visible(False)
    try:
        return save(figure, path)
    finally:
        plt.close(figure)


def draw_curves(report: Findings, path: Path, most: int = 8) -> Path:
    """The metric over steps: mean of the seeds, with a band from the lowest to the highest; the ideas that differ most."""
    plt, tasks = pyplot(), report.tasks()
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.6 * rows), squeeze=False, layout='constrained')
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
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
        axis.set_title(f'{task}: {report_metric(report, task)}', fontsize=10, loc='left')
        axis.set_xlabel('steps', fontsize=8)
        axis.tick_params(labelsize=8)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
        axis.spines[['top', 'right']].set_visible(False)
    try:
        return save(figure, path)
    finally:
        plt.close(figure)


def report_metric(report: Findings, task: str) -> str:
    return next(outcome.metric for outcome in report.outcomes if outcome.task == task)
