"""The tables of arguments in the documentation are those of the docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / 'docs').glob('*.md')) if '<!-- arguments of ' in page.read_text(encoding='utf-8')]


def tool():
    return load_script('tools/generate_arguments.py')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_tables_are_current(page):
    text = page.read_text(encoding='utf-8')
    assert text.count('<!-- arguments of ') == text.count('<!-- end of arguments -->') == len(tool().BLOCK.findall(text))
    assert tool().filled(text) == text, 'run `make docs`'


def test_pages_exist():
    assert len(PAGES) >= 5


class Sample:
    """A thing.

    Args:
        one: the first, with `a | b` and
            a second line.
        two, three: both.

    Raises:
        ValueError: never.
    """

    def __init__(self, one: int, two: bool = False, three: bool = False) -> None: ...


class Silent:
    """Says nothing.

    Args:
        one: the first.
    """

    def __init__(self, one: int, other: int = 3) -> None: ...


def test_entries_of_a_docstring(monkeypatch):
    made = tool()
    monkeypatch.setattr(made, 'find', lambda path: Sample)
    assert made.table('Sample').splitlines()[2:] == [
        '| `one` | required | The first, with `a \\| b` and a second line. |',
        '| `two`, `three` | `False` | Both. |',
    ]


def test_an_argument_without_a_word_is_refused(monkeypatch):
    made = tool()
    monkeypatch.setattr(made, 'find', lambda path: Silent)
    with pytest.raises(made.Undocumented, match='does not mention other'):
        made.table('Silent')
