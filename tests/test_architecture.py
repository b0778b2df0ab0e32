"""docs/architecture.md describes the house as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'src/x_transformers'
TEXT = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')


def test_tree_and_screens_are_current() -> None:
    spec = importlib.util.spec_from_file_location('generate_architecture', ROOT / 'tools/generate_architecture.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.generated() == TEXT, 'run `make docs`'
    for path in PACKAGE.rglob('*.py'):
        assert path.name == '__init__.py' or module.says(path), f'{path} does not say what it is'


@pytest.mark.parametrize(('path', 'lines'), re.findall(r'^\| `([\w/]+\.py)` \| (\d+) \|', TEXT, re.MULTILINE))
def test_lines_of_the_reading_order_are_about_right(path: str, lines: str) -> None:
    actual = len((PACKAGE / path).read_text(encoding='utf-8').splitlines())
    assert abs(actual - int(lines)) <= 40, f'{path} has {actual} lines'


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r'`((?:[a-z_]+/)*[a-z_]+\.py)`', TEXT))
    known = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py')}
    known |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tests/**/*.py')}
    missing = [name for name in named if not any(path == name or path.endswith(f'/{name}') for path in known)]
    assert len(named) > 40
    assert not missing
