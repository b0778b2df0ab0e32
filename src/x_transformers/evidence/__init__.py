"""Tasks, paired runs, statistics and reports that test whether an idea helps. No other folder of the package imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x_transformers.evidence.ablation import ablate
    from x_transformers.evidence.model import AnswerModel, Batch
    from x_transformers.evidence.report import Report
    from x_transformers.evidence.tasks.base import SequenceTask, Task

WHERE = {
    'AnswerModel': 'model',
    'Batch': 'model',
    'Report': 'report',
    'SequenceTask': 'tasks.base',
    'Task': 'tasks.base',
    'ablate': 'ablation',
}

__all__ = ['AnswerModel', 'Batch', 'Report', 'SequenceTask', 'Task', 'ablate']


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'{__name__}.{WHERE[name]}'), name)
