"""What the pages in docs/ show works as written, with the shapes that their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from x_transformers.randomness import decide_alike

DOCS = Path(__file__).parents[1] / 'docs'
SNIPPETS = [
    pytest.param(block, id=f'{page.stem}-{number}')
    for page in sorted(DOCS.glob('*.md'))
    for number, block in enumerate(
        re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE), start=1
    )
]


def test_there_are_snippets():
    assert len(SNIPPETS) >= 6


# what Lightning does to itself, and what it advises
@pytest.mark.filterwarnings(r'ignore:.isinstance\(treespec, LeafSpec:FutureWarning')
@pytest.mark.filterwarnings('ignore:The .train_dataloader. does not have many workers')
@pytest.mark.parametrize('block', SNIPPETS)
def test_snippet_runs_and_shapes_are_as_its_comments_say(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    for package in re.findall(r'^from (accelerate|lightning|lm_eval|peft|torchao|transformers)\b', block, re.MULTILINE):
        pytest.importorskip(package, reason=f'{package} is an extra of the developers, or left to the user')
    names: dict[str, object] = {}
    try:
        exec(compile(block, 'snippet', 'exec'), names)
    finally:
        decide_alike(None)  # one asks for decisions that hold in the whole process
    for name, shape in re.findall(r'^(\w+) = .*# \(([\d, ]+)\)$', block, re.MULTILINE):
        assert tuple(names[name].shape) == tuple(int(size) for size in shape.split(',') if size.strip()), name
