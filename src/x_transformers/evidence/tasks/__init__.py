"""The registry of tasks by name, and tasks that a user names by a Python path."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from x_transformers.evidence.tasks.base import SequenceTask, Task
from x_transformers.evidence.tasks.data import ByteText, Digits, LongerBytes, Shapes, WholeDigits
from x_transformers.evidence.tasks.length import (
    Addition,
    Copy,
    Cycle,
    Duplicate,
    EvenPairs,
    LengthTask,
    ModularArithmetic,
    Parity,
    Reverse,
    Sort,
)
from x_transformers.evidence.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopy,
)
from x_transformers.evidence.tasks.physics import Depo, Mano
from x_transformers.evidence.tasks.recall import Compositional, ContinuousRecall, Forgetting, Recall, Stacked
from x_transformers.flags.base import FlagError, kinds_of, one_kind, shown, type_hints
from x_transformers.training.errors import TrainingError
from x_transformers.training.options import fits

MAD = (InContextRecall, NoisyRecall, FuzzyRecall, SelectiveCopy, Compression, Memorization)
LENGTH = (Parity, EvenPairs, Cycle, ModularArithmetic, Copy, Reverse, Duplicate, Sort, Addition)
CLASSES: tuple[type[SequenceTask], ...] = (
    *(Recall, Forgetting, Compositional, Stacked, ContinuousRecall),
    *MAD,
    *LENGTH,
    *(Depo, Mano, ByteText, LongerBytes, Digits, WholeDigits, Shapes),
)
TASKS: dict[str, type[SequenceTask]] = {task.name: task for task in CLASSES}


def check_among(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Errors: ``TrainingError`` for names that are not among those known, such as keys of a file or options of a task."""
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f'Did you mean {near[0]}?' if near else 'Remove what is not among them.'
        raise TrainingError(f'{what} must be among {", ".join(sorted(known))}, got {", ".join(unknown)}. {hint}')


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name, such as ``mqar``, or of a path, such as ``my_tasks.py:Reversal`` or ``package.tasks:Reversal``.

    Errors: ``TrainingError`` for a task that does not exist or an option that it does not have.
    """
    options = dict(options or {})
    cls = own_class(name) if ':' in name else TASKS.get(name)
    if cls is None:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f' Did you mean {near[0]}?' if near else ' Choose one of them.'
        raise TrainingError(f'--task must be one of {", ".join(TASKS)}, or FILE.py:CLASS, got {name!r}.{hint}')
    known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else None
    if known is not None:
        check_among(f'options of the task {name}', options, known)
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    if known is not None:
        refuse_other_kinds(name, cls, options)
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        if isinstance(error, FlagError):
            raise
        raise TrainingError(f'the task {name} cannot be made: {error}') from error


def refuse_other_kinds(name: str, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse values that are not of the type of the option's field."""
    hints, wrong = type_hints(cls), []
    for option, value in options.items():
        if not fits(value, hints[option]):
            wanted = ' or '.join(one_kind(kind)[0] for kind in kinds_of(hints[option]))
            wrong.append(f'{option} must be {wanted}, got {shown(value)}')
    if wrong:
        raise TrainingError(f'the task {name} cannot be made: {"; ".join(wrong)}. Give another value.')


def own_class(path: str) -> type[Task]:
    """The class that ``FILE.py:CLASS`` or ``MODULE:CLASS`` names."""
    where, _, name = path.rpartition(':')
    try:
        if where.endswith('.py'):
            module_name = f'x_transformers_own_task_{Path(where).stem}'
            spec = importlib.util.spec_from_file_location(module_name, where)
            if spec is None or spec.loader is None or not Path(where).is_file():
                raise TrainingError(f'--task must name a file that exists, got {where}. Give FILE.py:CLASS.')
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
        else:
            if '' not in sys.path:
                sys.path.insert(0, '')
            module = importlib.import_module(where)
    except TrainingError:
        raise
    except Exception as error:
        why = f'{type(error).__name__}: {error}'
        raise TrainingError(f'--task must name a module that can be imported, got {path}: {why}. Correct it there.') from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TrainingError(
            f'--task must name a class derived from x_transformers.evidence.Task, got {name} in {where}. Name such a class.'
        )
    return found


__all__ = ['CLASSES', 'LENGTH', 'MAD', 'TASKS', 'LengthTask', 'SequenceTask', 'Task', 'make_task']
