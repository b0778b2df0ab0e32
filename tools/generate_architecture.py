"""Bring docs/architecture.md up to date: the tree with one line per file, and the functions quoted from the code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

from x_transformers.attention.attention import Attention
from x_transformers.layers.layer import Layer
from x_transformers.layers.stack import AttentionLayers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'src/x_transformers'
PATH = ROOT / 'docs/architecture.md'
# a length on the page may be off by so many lines
TOLERANCE = 40


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding='utf-8').splitlines())


def says(path: Path) -> str:
    """What a file is: the first sentence of its docstring, without addresses."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    text = ' '.join(text.split('\n\n')[0].split())
    text = re.sub(r'\s*\(https?://[^)]*\)|,?\s*https?://[^\s,)]*[^\s,):.;]', '', text)
    sentence = re.split(r'(?<=[a-z)`])[.;] |(?<=[a-z)`])\.$', text)[0].rstrip('.,')
    return re.sub(r'``', '', sentence)


def reading_order(text: str) -> str:
    """The page with the lengths of the files to read first. One that is about right stays: not every edit changes the page."""

    def row(found: re.Match[str]) -> str:
        lines = lines_of(PACKAGE / found['path'])
        return found[0] if abs(lines - int(found['lines'])) <= TOLERANCE else f'| `{found["path"]}` | {lines} |'

    return re.sub(r'^\| `(?P<path>[\w/]+\.py)` \| (?P<lines>\d+) \|', row, text, flags=re.MULTILINE)


def tree() -> str:
    rows = ['src/x_transformers/']

    def walk(folder: Path, depth: int) -> None:
        entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
        for path in entries:
            if path.is_dir() and any(path.glob('*.py')):
                rows.append(f'{"  " * depth}{path.name}/')
                walk(path, depth + 1)
            elif path.suffix == '.py' and (path.name != '__init__.py' or folder == PACKAGE):
                rows.append(f'{"  " * depth + path.name:<34}{says(path)}')

    walk(PACKAGE, 1)
    return '```text\n' + '\n'.join(row.rstrip() for row in rows) + '\n```'


def screen(function: object) -> str:
    return '```python\n' + textwrap.dedent(inspect.getsource(function)).rstrip() + '\n```'  # type: ignore[arg-type]


BLOCKS = {
    'tree': tree,
    'stack': lambda: screen(AttentionLayers.walk),
    'layer': lambda: screen(Layer.forward),
    'attention': lambda: screen(Attention._attended),
}


def generated() -> str:
    """The page with every block between its markers written anew."""
    text = reading_order(PATH.read_text(encoding='utf-8'))
    for name, make in BLOCKS.items():
        start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
        before, rest = text.split(start)
        text = f'{before}{start}\n{make()}\n{end}{rest.split(end)[1]}'
    return text


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
