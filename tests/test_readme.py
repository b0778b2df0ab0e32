"""What README shows works as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
SNIPPETS = re.findall(r'^```python\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE)


def test_readme_has_its_quick_starts():
    together = '\n'.join(SNIPPETS)
    for name in ('AutoregressiveWrapper', 'Decoder', 'Encoder', 'TransformerWrapper', 'ViTransformerWrapper', 'XTransformer'):
        assert name in together
    assert len(SNIPPETS) >= 7


@pytest.mark.parametrize('index', range(len(SNIPPETS)))
def test_snippet_runs_and_shapes_are_as_its_comments_say(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict[str, object] = {}
    exec(compile(SNIPPETS[index], f'README.md, block {index + 1}', 'exec'), names)
    said = re.findall(r'^(\w+) = .*# \(([\d, ]+)\)$', SNIPPETS[index], re.MULTILINE)
    for name, shape in said:
        assert tuple(names[name].shape) == tuple(int(size) for size in shape.split(',') if size.strip()), name


def test_misspelt_flag_is_told(capsys):
    exec(next(snippet for snippet in SNIPPETS if 'qk_nrom' in snippet), {})
    assert 'did you mean `attn_qk_norm`?' in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)\)', TEXT):
        if '://' not in target:
            assert (ROOT / target).exists(), target
