"""What the documentation says of the tests must be true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIFFERENCES = (ROOT / 'docs' / 'differences.md').read_text()


def rows() -> list[str]:
    """The rows of all tables, without heads and lines."""
    lines = [line for line in DIFFERENCES.splitlines() if line.startswith('|')]
    return [line for line in lines if not line.startswith('|---') and not line.endswith('| test |')]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_differences_names_a_test() -> None:
    assert len(rows()) > 100
    for row in rows():
        assert re.search(r'`tests/[\w/]+\.py::test_\w+` \|$', row), row


@pytest.mark.parametrize('path', sorted(set(re.findall(r'`(tests/[\w/]+\.py)::', DIFFERENCES))))
def test_every_test_that_is_named_exists(path: str) -> None:
    named = set(re.findall(rf'`{re.escape(path)}::(test_\w+)`', DIFFERENCES))
    assert named <= functions(ROOT / path), named - functions(ROOT / path)
