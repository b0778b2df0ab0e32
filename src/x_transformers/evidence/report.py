"""The outputs of an experiment: files, pictures, a page, and the JSON line that ends a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from x_transformers.evidence.experiment import Experiment
from x_transformers.evidence.findings import Findings
from x_transformers.evidence.runs import write_text


class Report(Findings):
    """What an experiment found, with what is written of it."""

    def plot(self) -> tuple[Path, Path]:
        """(forest plot, learning curves) as PNG files in the folder."""
        from x_transformers.evidence.plots import draw_curves, draw_forest

        return draw_forest(self, self.folder / 'forest.png'), draw_curves(self, self.folder / 'curves.png')

    def page(self) -> Path:
        """One HTML file that needs nothing else."""
        from x_transformers.evidence.page import render

        path = self.folder / 'index.html'
        write_text(path, render(self))
        return path

    def write(self, pictures: bool = True) -> Path:
        """results.jsonl, table.md, index.html and the pictures; the page's path."""
        write_text(self.folder / 'results.jsonl', ''.join(json.dumps(row, default=list) + '\n' for row in self.rows))
        write_text(self.folder / 'table.md', self.table(markdown=True) + '\n\n' + '\n'.join(self.notes()) + '\n')
        if pictures:
            self.plot()
        return self.page()

    def json(self, **more: Any) -> str:
        """The last line of a command."""
        value = {'command': 'ablate', 'folder': str(self.folder), 'page': str(self.folder / 'index.html'), 'runs': self.runs}
        value |= {'missing': self.missing, **more, 'rows': self.rows}
        return json.dumps(value, default=list)


def make_report(
    experiment: Experiment, broken: Mapping[tuple[str, str], str], about: Mapping[str, Any] | None = None
) -> Report:
    jobs = experiment.jobs(broken)
    done = sum(experiment.store.settled(job) for job in jobs)
    report = Report(experiment.outcomes(broken), experiment.folder, done, len(jobs) - done, dict(about or {}))
    report.failures = sum(experiment.store.failure(job) is not None for job in jobs)
    failed = {(outcome.task, outcome.idea) for outcome in report.outcomes if outcome.failed is not None}
    for question in experiment.questions:
        for arm in question.arms:
            failure = experiment.store.failure(experiment.cost(question, arm)) if experiment.costs else None
            # where the runs failed too, their row says why
            if failure is not None and (question.title, arm.name) not in failed:
                report.untimed[question.title, arm.name] = failure['why']
        report.baseline_curves[question.title] = experiment.curves(question)
        report.about.setdefault('questions', {})[question.title] = {
            'task': {name: value for name, value in experiment.identities[question.title].items() if name != 'source'},
            'base': dict(question.base),
            'settings': question.settings.written(),
            'seeds': question.seeds,
        }
    return report
