"""Fill the tables of arguments in docs/*.md from docstrings and flags.

A page holds, on lines of their own, ``<!-- arguments of MODULE.CLASS -->`` or ``<!-- arguments of MODULE.CLASS.METHOD -->``
and later ``<!-- end of arguments -->``; what stands between them is written here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from x_transformers.flags.base import REQUIRED, Flags, default_of, shown

DOCS = Path(__file__).parent.parent / 'docs'
BLOCK = re.compile(r'(<!-- arguments of ([\w.]+) -->\n).*?(<!-- end of arguments -->)', re.DOTALL)
ENTRY = re.compile(r'(\w+(?:, \w+)*): (.*)')


class Undocumented(Exception):
    """An argument that the docstring does not mention."""


def find(path: str) -> Any:
    """The class or method of a dotted path."""
    parts = path.split('.')
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module('.'.join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise LookupError(f'{path} is not to be found')


def entries(docstring: str) -> list[tuple[list[str], str]]:
    """What stands under ``Args:``, as (names, sentence)."""
    found = re.search(r'^Args:\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))*)', inspect.cleandoc(docstring), re.MULTILINE)
    rows: list[tuple[list[str], str]] = []
    for line in (found[1] if found else '').splitlines():
        entry = ENTRY.fullmatch(line[4:])
        if entry:
            rows.append((entry[1].split(', '), entry[2]))
        elif rows:
            rows[-1] = (rows[-1][0], f'{rows[-1][1]} {line.strip()}'.strip())
    return rows


def flags_of(about: str) -> type[Flags] | None:
    """The class of flags that a docstring names as its keywords."""
    named = re.search(r'(?:the fields\s+of|flags:)\s+``(\w+Flags)``', about)
    if named is None:
        return None
    names = ('wrapper', 'vision', 'other_inputs', 'stack')
    modules = (importlib.import_module(f'x_transformers.flags.{name}') for name in names)
    return next(getattr(module, named[1]) for module in modules if hasattr(module, named[1]))


def default_text(parameter: inspect.Parameter | None) -> str:
    if parameter is None or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return ''
    if parameter.default is parameter.empty:
        return 'required'
    value = parameter.default
    return f'`{value.__name__ if isinstance(value, Callable) else repr(value)}`'


def signature_rows(thing: Any, path: str) -> list[tuple[str, str, str]]:
    """(names, defaults, sentence) of each entry; every parameter must be named in the docstring."""
    about = inspect.getdoc(thing) or ''
    parameters = dict(inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters)
    parameters.pop('self', None)
    missing = [name for name in parameters if not re.search(rf'\b{name}\b', about)]
    if missing:
        raise Undocumented(f'the docstring of {path} does not mention {", ".join(missing)}')
    rows = []
    for names, says in entries(about):
        given = [default_text(parameters.get(name)) for name in names]
        rows.append((', '.join(f'`{name}`' for name in names), ', '.join(dict.fromkeys(given)), says))
    if not rows:
        raise Undocumented(f'the docstring of {path} has no entries under `Args:`')
    return rows


def flag_rows(flags: type[Flags]) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in flags.flag_fields().items():
        default = default_of(field)
        rows.append((f'`{name}`', 'required' if default is REQUIRED else f'`{shown(default)}`', field.metadata['says']))
    return rows


def summary(method: Any) -> str:
    """A method's name and the first paragraph of its docstring."""
    first = (inspect.getdoc(method) or '').split('\n\n')[0].replace('\n', ' ')
    return f'`{method.__name__}`: ' + re.sub(r'``(.+?)``', r'`\1`', first)


def table(path: str) -> str:
    """The table of one class or method."""
    thing = find(path)
    flags = flags_of(inspect.getdoc(thing) or '') if inspect.isclass(thing) else None
    rows = flag_rows(flags) if flags else signature_rows(thing, path)
    lines = [] if inspect.isclass(thing) else [summary(thing), '']
    lines += ['| argument | default | what it does |', '| --- | --- | --- |']
    for cells in rows:
        texts = (re.sub(r'``(.+?)``', r'`\1`', cell).replace('|', r'\|') for cell in cells)
        lines.append('| ' + ' | '.join(text[:1].upper() + text[1:] if text[:1].isalpha() else text for text in texts) + ' |')
    return '\n'.join(lines).replace('| Required |', '| required |')


def filled(page: str) -> str:
    """The text of a page with its tables as they should be."""
    return BLOCK.sub(lambda found: f'{found[1]}\n{table(found[2])}\n\n{found[3]}', page)


if __name__ == '__main__':
    for page in sorted(DOCS.glob('*.md')):
        old = page.read_text(encoding='utf-8')
        if BLOCK.search(old):
            page.write_text(filled(old), encoding='utf-8')
            print(f'wrote {page}')
