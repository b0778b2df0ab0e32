"""``ablate``: the command's function from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from x_transformers.evidence.experiment import Arm, Experiment, Question, folder_name
from x_transformers.evidence.plan import question
from x_transformers.evidence.report import Report, make_report
from x_transformers.evidence.runs import Settings, TaskName
from x_transformers.evidence.tasks.base import Task
from x_transformers.flags.presets import with_preset


def ablate(
    task: Task | str,
    base: Mapping[str, Any] | None = None,
    ideas: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int = 3,
    *,
    out: str | Path | None = None,
    workers: int = 0,
    steps: int | None = None,
    lr: float | None = None,
    **settings: Any,
) -> Report:
    """Train the baseline and each idea on the same seeds and compare them.

    Args:
        task: a name such as ``'mqar'``, a path such as ``'my_tasks.py:Reversal'``, or a ``Task``.
        base: flags of the baseline, on top of the task's own. ``preset`` among them names a set of flags, as in ideas.
        ideas: flags of each idea, on top of the baseline's.
        seeds: paired seeds per arm; two are the least for an interval.
        out: the folder of runs and reports; finished runs in it are not done again. Left out: below runs/ablate.
        workers: processes of one thread each; 0: this process. A script that asks for some needs
            ``if __name__ == '__main__':`` around its own doings.
        steps, lr: those of the task where left out; further settings are the fields of ``Settings``.

    Errors: ``TrainingError`` for a task that does not exist and a folder of something else, ``FlagError`` for flags that do not
    exist. An idea that cannot be built or trained is a row that says why.
    """
    arms = [Arm(name, dict(flags)) for name, flags in (ideas or {}).items()]
    chosen = {name: value for name, value in {'steps': steps, 'lr': lr, **settings}.items() if value is not None}
    if isinstance(task, Task):
        flags = {**task.flags, **with_preset(base or {})}
        arms = [Arm(arm.name, with_preset(arm.flags)) for arm in arms]
        plan = Settings(**{'steps': task.steps, 'lr': task.lr, **chosen})
        asked = Question(TaskName(task.name), flags, plan, tuple(arms), seeds, task.name, made=task)
    else:
        asked = question({'task': task}, dict(base or {}), arms, seeds=seeds, settings=chosen)
    folder = Path(out) if out is not None else Path('runs/ablate') / folder_name([asked])
    experiment = Experiment((asked,), folder)
    broken = experiment.check()
    experiment.open(resume=True)
    experiment.go(workers=workers, broken=broken)
    return make_report(experiment, broken)
