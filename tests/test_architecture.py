"""docs/architecture.md describes the package as it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'src/x_transformers'
TEXT = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')


def test_tree_and_quoted_functions_are_current() -> None:
    module = load_script('tools/generate_architecture.py')
    assert module.generated() == TEXT, 'run `make docs`'
    for path in PACKAGE.rglob('*.py'):
        assert path.name == '__init__.py' or module.says(path), f'{path} does not say what it is'


@pytest.mark.parametrize(('path', 'lines'), re.findall(r'^\| `([\w/]+\.py)` \| (\d+) \|', TEXT, re.MULTILINE))
def test_lines_of_the_reading_order_are_about_right(path: str, lines: str) -> None:
    actual = len((PACKAGE / path).read_text(encoding='utf-8').splitlines())
    assert abs(actual - int(lines)) <= 40, f'{path} has {actual} lines'


def test_what_a_first_reader_reads_stays_short() -> None:
    files = re.findall(r'^\| `([\w/]+\.py)` \| \d+ \|', TEXT, re.MULTILINE)
    lines = {path: len((PACKAGE / path).read_text(encoding='utf-8').splitlines()) for path in files}
    assert len(files) == 7
    assert sum(lines.values()) <= 1700, f'{lines}: move what a first reader does not need into a file beside it'


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r'`((?:[a-z_]+/)*[a-z_]+\.py)`', TEXT))
    known = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py')}
    known |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tests/**/*.py')}
    missing = [name for name in named if not any(path == name or path.endswith(f'/{name}') for path in known)]
    assert len(named) > 40
    assert not missing


# ---------------------------------------------------------------- who imports whom


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules in ``known`` that a file imports: when it is loaded, in a function, or for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute here'
            names = [f'{node.module}.{name.name}' for name in node.names]
            yield from (name if name in known else node.module for name in names if {name, node.module} & known)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_one_that_imports_it() -> None:
    paths = {module_of(path): path for path in PACKAGE.rglob('*.py')}
    # the package itself is a table of names, looked up when somebody asks for one
    del paths['x_transformers']
    imports = {name: set(imported(ast.parse(path.read_text(encoding='utf-8')), set(paths))) for name, path in paths.items()}
    assert sum(map(len, imports.values())) > 900
    found = circle(imports)
    assert not found, f'{" -> ".join(found)}: move what both need into a module below them'


def test_a_circle_is_found_wherever_the_import_stands() -> None:
    known = {'a', 'b', 'c'}
    deferred = 'def f():\n    from b import x\n'
    typed = 'if TYPE_CHECKING:\n    import c\n'
    files = {'a': deferred, 'b': typed, 'c': 'from a import y\n'}
    imports = {name: set(imported(ast.parse(text), known)) for name, text in files.items()}
    assert set(circle(imports)) == known
    assert not circle(imports | {'c': set()})
