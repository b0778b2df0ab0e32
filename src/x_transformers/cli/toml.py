"""A TOML file with options: ``key = value`` with the names of the command line (hyphens or underscores)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from x_transformers.cli.options import GROUPS, all_keywords, group_class, group_keywords, takes_tuple
from x_transformers.flags.base import FlagError, kinds_of, shown, tidied, type_hints, unknown_flags
from x_transformers.flags.presets import preset
from x_transformers.training.build import USUAL_PRESET
from x_transformers.training.errors import TrainingError
from x_transformers.training.options import fits


def config_path(arguments: Sequence[str]) -> str | None:
    """The value of ``--config``, which must be known before the other options are read: they override the file."""
    return value_typed(arguments, '--config', 'the path of a TOML file')


def value_typed(arguments: Sequence[str], option: str, what: str) -> str | None:
    """The value of an option that decides what others default to."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f'{option}='):
            return argument.partition('=')[2]
        if argument == option:
            if index + 1 == len(arguments):
                raise TrainingError(f'{option} needs {what}')
            return arguments[index + 1]
    return None


def read_toml(path: str) -> dict[str, Any]:
    """The file's keys with underscores."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise TrainingError(f'--config {path} cannot be read: {error.strerror or error}') from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f'--config {path} is not valid TOML: {error}') from error
    return {name.replace('-', '_'): value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class FileValues:
    """What a file says: for the groups of model flags, for the command's own options, and what only a file can give."""

    groups: dict[str, Any]
    own: dict[str, Any]
    only_here: dict[str, Any]
    names: frozenset[str] = frozenset()
    preset: str | None = None
    """The preset that somebody named."""


def from_file(path: str | None, own: type | None = None, arguments: Sequence[str] = ()) -> FileValues:
    """Read and check a file against the flags and the fields of ``own``, on top of the preset that it or ``arguments`` name.

    Errors: ``FlagError`` naming every unknown key, with the nearest known one, and every value of the wrong kind.
    """
    values = read_toml(path) if path is not None else {}
    in_file = values.pop('preset', None)
    named = value_typed(arguments, '--preset', 'the name of a preset') or in_file
    usual = preset(named or USUAL_PRESET)
    own_fields = {field.name: field for field in dataclasses.fields(own)} if own is not None else {}
    unknown = [name for name in values if name not in all_keywords() and name not in own_fields]
    if unknown:
        raise unknown_flags(unknown, where=f'--config {path}', known=[*own_fields, *all_keywords()])

    wrong: list[str] = []
    result = FileValues({}, {}, {}, frozenset(values), named)
    for group in GROUPS:
        of_group = {name: usual[name] for name in group_keywords(group) if name in usual and group != 'cross_attention'}
        for name in group_keywords(group):
            if name in values:
                keyword = group_keywords(group)[name]
                if keyword.per_layer and isinstance(values[name], list) and not takes_tuple(keyword.kinds):
                    # one for each layer; the stack checks them, when it knows the layers
                    (of_group if takes_tuple(keyword.plain_kinds) else result.only_here)[name] = tuple(values[name])
                    continue
                read, errors = keyword.flags.read({keyword.field_name: values[name]}, where=f'--config {path}')
                wrong += errors
                target = of_group if keyword.has_option and not isinstance(values[name], dict) else result.only_here
                target[name] = read[keyword.field_name]
        if not wrong:
            result.groups[group] = group_class(group)(**of_group)
    for name in own_fields:
        if name in values:
            hint = type_hints(own)[name] if own is not None else Any
            result.own[name] = tidied(listed(values[name], hint), hint)
            if not fits(result.own[name], hint):
                wrong.append(
                    f'--config {path}: `{name}` cannot be {shown(values[name])} (of type {type(values[name]).__name__}).'
                )
    if wrong:
        raise FlagError(*wrong)
    return result


def listed(value: Any, hint: Any) -> Any:
    """A word for an option that takes several is one of them."""
    takes_several = any(get_origin(kind) is tuple for kind in kinds_of(hint))
    return [value] if takes_several and isinstance(value, str) else value
