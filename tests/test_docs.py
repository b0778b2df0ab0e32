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


PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('**/*.md')])
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')


def anchors(page: Path) -> set[str]:
    """As they are made of headings where the pages are shown."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page: Path) -> None:
    for found in LINK.findall(page.read_text(encoding='utf-8')):
        target = found[0] or found[1]
        if '://' in target or target.startswith('mailto:'):
            continue
        path, _, anchor = target.partition('#')
        there = page.parent / path if path else page
        assert there.exists(), f'{page.name}: {target}'
        assert not anchor or anchor in anchors(there), f'{page.name}: no heading for {target}'


def test_every_picture_is_shown() -> None:
    shown = ''.join(page.read_text(encoding='utf-8') for page in PAGES)
    assert [path.name for path in (ROOT / 'docs/assets').iterdir() if f'assets/{path.name}' not in shown] == []


EXAMPLES = [path for path in sorted((ROOT / 'examples').glob('*.py')) if path.stem != 'common']


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda path: path.stem)
def test_every_example_stands_on_a_page_with_its_picture(example: Path) -> None:
    pages = [page for page in PAGES if f'examples/{example.name}' in page.read_text(encoding='utf-8')]
    assert pages, f'{example.name} is on no page'
    if 'run.picture(' in example.read_text(encoding='utf-8'):
        assert any(f'assets/{example.stem}.png' in page.read_text(encoding='utf-8') for page in pages), example.stem


STEMS = 'amort general initial maxim memor minim normal optim organ orthogonal parametr quant recogn serial summar'
OTHER_SPELLING = re.compile(rf"(?<![\w/'])(?:re)?(?:{STEMS.replace(' ', '|')})is(?:e|ed|er|ers|es|ing|ation)\b", re.IGNORECASE)


def test_one_spelling() -> None:
    """Words in -ize; otherwise British, as in colour."""
    assert OTHER_SPELLING.search('a normalised gain')
    assert not OTHER_SPELLING.search('a normalized gain')
    sources = [path for folder in ('src', 'tools', 'benchmarks', 'examples') for path in (ROOT / folder).rglob('*.py')]
    pages = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + [*(ROOT / 'docs').glob('*.md')]
    assert len(sources) > 300
    found = [f'{path.name}: {word}' for path in sources + pages for word in OTHER_SPELLING.findall(path.read_text('utf-8'))]
    assert not found
