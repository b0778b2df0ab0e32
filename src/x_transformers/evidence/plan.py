"""The plan of an experiment from a TOML file or the command line: tasks, baseline, ideas."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from x_transformers.evidence.experiment import BASELINE, INDEPENDENT, Arm, Question
from x_transformers.evidence.runs import Settings, TaskName
from x_transformers.evidence.tasks import check_among, make_task
from x_transformers.flags.base import kinds_of, one_kind
from x_transformers.flags.presets import with_preset, without_usual
from x_transformers.training.errors import TrainingError
from x_transformers.training.options import fits

SETTINGS = {field.name for field in dataclasses.fields(Settings)}
TOP = {*SETTINGS, 'task', 'tasks', 'base', 'ideas', 'options', 'seeds', 'workers', 'out', 'lr_grid', 'device', 'ladder'}
OF_TASK = ('task', 'label', 'options', 'base')
KINDS: dict[str, Any] = {'task': str | Sequence[str], 'seeds': int, 'workers': int, 'out': str, 'device': str}
"""What values of a file may be; settings and options of tasks are checked where they are read."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A file, read: one entry per task, the ideas that all of them try, and options for the command."""

    tasks: tuple[Mapping[str, Any], ...]
    base: Mapping[str, Any]
    ideas: tuple[Arm, ...]
    settings: Mapping[str, Any]
    more: Mapping[str, Any]


def parsed_value(text: str) -> Any:
    """A value as in TOML: true, 3, 0.5, [1, 2], "word"; else a word. ``True`` and ``None`` are known too."""
    known = {'True': True, 'False': False, 'None': None}
    if text in known:
        return known[text]
    try:
        return as_tuples(tomllib.loads(f'value = {text}')['value'])
    except tomllib.TOMLDecodeError:
        return text


def as_tuples(value: Any) -> Any:
    """Lists become tuples, as constructors take them."""
    if isinstance(value, list):
        return tuple(as_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: as_tuples(item) for name, item in value.items()}
    return value


def pairs_of(words: Iterable[str], option: str) -> dict[str, Any]:
    """``name=value`` words, several in one separated by commas or blanks."""
    found: dict[str, Any] = {}
    for word in words:
        for part in split_words(word):
            name, equals, value = part.partition('=')
            if not equals or not name:
                raise TrainingError(f'{option} must be NAME=VALUE, got {part!r}. Write for example {option} depth=2.')
            found[name.strip().replace('-', '_')] = parsed_value(value.strip())
    return found


def split_words(text: str) -> list[str]:
    """Split at commas and blanks that stand in no bracket and no quotes."""
    parts, depth, quoted, start = [], 0, '', 0
    for place, sign in enumerate(text):
        if quoted:
            quoted = '' if sign == quoted else quoted
        elif sign in '"\'':
            quoted = sign
        elif sign in '[{(':
            depth += 1
        elif sign in ']})':
            depth -= 1
        elif depth == 0 and sign in ', ':
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part for part in parts if part]


def arm_of(text: str) -> Arm:
    """An idea from its flags, ``ff_glu=true,ff_swish=true``; a name may stand in front: ``swiglu: ff_glu=true``."""
    name, colon, rest = text.partition(':')
    named = colon and '=' not in name and name
    return Arm(name.strip() if named else text.strip(), pairs_of([rest if named else text], '--idea'))


def check_plan_file(path: str, values: Mapping[str, Any]) -> None:
    """Errors: ``TrainingError`` for keys that mean nothing and values of another kind."""
    check_among(f'{path}: keys', values, TOP)
    for name in ('base', 'ideas', 'tasks', 'options'):
        if not isinstance(values.get(name, {}), dict):
            raise TrainingError(f'{path}: {name} must be a table, got {values[name]!r}. Write [{name}] and its keys below.')
    for name, flags in values.get('ideas', {}).items():
        if not isinstance(flags, dict):
            raise TrainingError(f'{path}: the idea {name} must be a table of flags, got {flags!r}. Write [ideas.{name}].')
    for name, entry in values.get('tasks', {}).items():
        if not isinstance(entry, dict):
            raise TrainingError(f'{path}: the task {name} must be a table, got {entry!r}. Write [tasks.{name}].')
        check_among(f'{path}: [tasks.{name}]: keys', entry, {*SETTINGS, *OF_TASK})
        for part in ('options', 'base'):
            if not isinstance(entry.get(part, {}), dict):
                raise TrainingError(f'{path}: {part} of {name} must be a table, got {entry[part]!r}. Write {{ NAME = VALUE }}.')
    for name, kind in KINDS.items():
        if name in values and not fits(values[name], kind):
            wanted = ' or '.join(one_kind(part)[0] for part in kinds_of(kind))
            raise TrainingError(f'{path}: {name} must be {wanted}, got {values[name]!r}. Give another value.')
    if 'task' in values and 'tasks' in values:
        raise TrainingError(f'{path} must have either task or [tasks.NAME], got both. Leave out one.')


def read_plan(path: str) -> Plan:
    """Errors: ``TrainingError`` for a file that cannot be read, is no TOML, or has keys that mean nothing."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise TrainingError(f'{path} cannot be read: {error.strerror or error}. Give the path of a TOML file.') from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f'{path} must be a TOML file, got: {error}. Correct it there.') from error
    check_plan_file(path, values)
    single = values.get('task', ())
    names = [single] if isinstance(single, str) else list(single)
    tasks: list[Mapping[str, Any]] = [{'task': name, 'options': values.get('options', {})} for name in names]
    tasks += [{'label': label, 'task': label, **as_tuples(table)} for label, table in values.get('tasks', {}).items()]
    return Plan(
        tuple(tasks),
        as_tuples(values.get('base', {})),
        tuple(Arm(name, as_tuples(flags)) for name, flags in values.get('ideas', {}).items()),
        {name: values[name] for name in SETTINGS if name in values},
        {name: values[name] for name in ('seeds', 'workers', 'out', 'lr_grid', 'device', 'ladder') if name in values},
    )


def question(
    entry: Mapping[str, Any],
    base: Mapping[str, Any],
    ideas: Sequence[Arm],
    *,
    seeds: int,
    settings: Mapping[str, Any],
    width: float | None = None,
    lr_grid: Sequence[float] = (),
    device: str = 'cpu',
) -> Question:
    """One task of a plan. ``entry`` may hold ``label``, ``options``, ``base`` and any of the settings, for this task alone."""
    options = dict(entry.get('options', {}))
    name = TaskName(str(entry['task']), options)
    task = make_task(name.name, options)
    own = {**base, **entry.get('base', {})}
    flags = {**task.flags, **with_preset(own)}
    flags = without_usual(flags) if 'preset' in own else flags
    label = str(entry.get('label', task.name if ':' in name.name else name.name))
    if width is not None:
        flags |= {part: max(1, round(flags[part] * width)) for part in ('dim', 'heads') if part in flags}
        label = f'{label} (width {flags["dim"]})'
    settings = {**settings, **{part: entry[part] for part in SETTINGS if part in entry}}
    chosen = Settings(**{'steps': task.steps, 'lr': task.lr, **settings})
    arms = tuple(dataclasses.replace(arm, flags=with_preset(arm.flags)) for arm in ideas)
    presets = {arm.name: str(arm.flags['preset']) for arm in ideas if 'preset' in arm.flags}
    if 'preset' in own:
        presets[BASELINE] = str(own['preset'])
    return Question(name, flags, chosen, arms, seeds, label, device, tuple(lr_grid), presets=presets)


def noise_arms(repetitions: int) -> list[Arm]:
    """The baseline again, with initial values and data of its own; and once more with the same, which must change nothing."""
    again = [Arm(f'other seeds {i + 1}', {}, INDEPENDENT + 1000 * i) for i in range(repetitions)]
    return [Arm('same seeds', {}), *again]
