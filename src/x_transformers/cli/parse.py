"""From arguments to a command's dataclass; short and long help; errors for unknown options."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Collection, Sequence
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro

from x_transformers.cli.options import all_keywords, is_refused
from x_transformers.flags.elsewhere import renamed_to
from x_transformers.training.errors import TrainingError

HELP = ('-h', '--help', '--help-all')


def typed_names(arguments: Sequence[str], known: Collection[str]) -> set[str]:
    """Which of the known names were typed, as ``--name``, ``--name=value`` or ``--no-name``."""
    names = set()
    for argument in arguments:
        if argument.startswith('--'):
            name = argument[2:].partition('=')[0].replace('-', '_')
            names |= {name, name.removeprefix('no_')} & set(known)
    return names


def in_help(full: Any, *, short: bool) -> list[str]:
    """The options that the help lists. Of a command that marks none of its own as wanted often, all its own count."""
    own = {name: field for name, field in all_fields(full).items() if name not in all_keywords()}
    marked = [name for name, field in own.items() if field.metadata.get('often')]
    flags = [name for name, keyword in all_keywords().items() if keyword.metadata['often'] or not short]
    return [*(marked if short and marked else own), *(name for name in flags if not is_refused(name))]


def parse_typed(full: Any, arguments: Sequence[str], prog: str) -> Any:
    """``full``, an instance of a command's dataclass, with what was typed in the place of its defaults.

    A parser for all options takes longer to make than a small model to build, so it is made for those that were typed. The
    short help has the options that matter most, ``--help-all`` those that the command does not refuse.

    Errors: ``TrainingError`` naming all unknown options, each with the nearest known one.
    """
    fields = all_fields(full)
    typed = typed_names(arguments, fields)
    asked = [argument for argument in arguments if argument in HELP]
    if asked:
        show_help(full, prog, short='--help-all' not in asked)
    refuse_unknown(arguments, fields, prog)
    read: Any = tyro.cli(narrowed(full, typed), args=list(arguments), prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(read):
        value, part = getattr(read, field.name), getattr(full, field.name)
        if is_group(part):
            value = dataclasses.replace(part, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        changes[field.name] = value
    return dataclasses.replace(full, **changes)


def all_fields(full: Any) -> dict[str, dataclasses.Field[Any]]:
    """Every option of a command by its name, those of its groups too."""
    by_name: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(full):
        part = getattr(full, field.name)
        inside = dataclasses.fields(part) if is_group(part) else (field,)
        by_name.update({option.name: option for option in inside})
    return by_name


def is_group(part: Any) -> bool:
    """Whether a field of a command holds options of its own."""
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def narrowed(full: Any, names: Collection[str], *, described: bool = False) -> type:
    """The dataclass of ``full`` with these options alone; their defaults are its values. ``described``: with sentences."""
    fields: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(type(full), include_extras=True)
    for field in dataclasses.fields(full):
        part = getattr(full, field.name)
        if is_group(part):
            says = sentences_of(type(part)) if described else {}
            inner = get_type_hints(type(part), include_extras=True)
            own: list[tuple[str, Any, Any]] = [
                (
                    option.name,
                    with_help(inner[option.name], says.get(option.name, '')),
                    dataclasses.field(default=getattr(part, option.name)),
                )
                for option in dataclasses.fields(part)
                if option.name in names
            ]
            own_class = dataclasses.make_dataclass(type(part).__name__, own, frozen=True, kw_only=True)
            own_class.__doc__ = type(part).__doc__
            marks = getattr(hints[field.name], '__metadata__', ())
            kind = Annotated[own_class, *marks] if marks else own_class
            fields.append((field.name, kind, dataclasses.field(default=own_class())))
        elif field.name in names:
            fields.append((field.name, hints[field.name], dataclasses.field(default=part)))
    return dataclasses.make_dataclass(type(full).__name__, fields, frozen=True)


def sentences_of(cls: type) -> dict[str, str]:
    """The sentence beneath each field of a dataclass; that of a subclass counts. Classes without a source have none."""
    sentences: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):
            continue
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                sentences[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return sentences


def with_help(kind: Any, sentence: str) -> Any:
    return Annotated[kind, tyro.conf.arg(help=sentence)] if sentence else kind


def show_help(full: Any, prog: str, *, short: bool) -> NoReturn:
    """Print the help and leave, as every parser does."""
    names = in_help(full, short=short)
    rest = len(all_fields(full).keys() & in_help(full, short=False)) - len(names)
    about = (type(full).__doc__ or '').strip()
    more = f'{about}\n\n{rest} more options, each a published idea or a detail: {prog} --help-all' if short else about
    tyro.cli(
        narrowed(full, names, described=True), args=['--help'], prog=prog, description=more, config=(tyro.conf.OmitArgPrefixes,)
    )
    raise SystemExit(0)


def refuse_unknown(arguments: Sequence[str], known: Collection[str], prog: str) -> None:
    options = [argument for argument in arguments if argument.startswith('-') and not is_numeric(argument)]
    unknown = [argument.partition('=')[0] for argument in options if not typed_names([argument], known)]
    sentences = []
    for option in unknown:
        name = option.lstrip('-').replace('-', '_')
        near = difflib.get_close_matches(name, known, n=1)
        here = renamed_to(name, known)
        if here is not None:
            hint = f'here it is --{here.replace("_", "-")}.'
        else:
            hint = f'did you mean --{near[0].replace("_", "-")}?' if near else f'{prog} --help-all lists all.'
        sentences.append(f'there is no option {option}; {hint}')
    if sentences:
        raise TrainingError(' '.join(sentences))


def is_numeric(argument: str) -> bool:
    try:
        float(argument)
    except ValueError:
        return False
    return True
