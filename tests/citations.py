"""Where a test is named as ``tests/file.py::name``: that it exists, and speaks of what it is named for."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def pieces(path: str) -> dict[str, str]:
    """The source of every function, with its decorators, and of every constant that these are made from, of a file."""
    text = (ROOT / path).read_text(encoding='utf-8')
    found: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found[node.name] = '\n'.join(text.splitlines()[first - 1 : node.end_lineno])
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.get_source_segment(text, node) or ''
    return found


def missing(citation: str, word: str) -> str:
    """What is wrong with a citation; empty if the function is there and it, or a constant that it names, has the word."""
    path, _, name = citation.partition('::')
    if not (ROOT / path).is_file() or name not in pieces(path):
        return f'{citation} does not exist'
    own = pieces(path)[name]
    read = [
        own,
        *(text for constant, text in pieces(path).items() if constant.isupper() and re.search(rf'\b{constant}\b', own)),
    ]
    return '' if any(re.search(rf'\b{re.escape(word)}\b', text) for text in read) else f'{citation} says nothing of {word}'
