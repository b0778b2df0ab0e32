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


def test_the_first_screen_fits_and_each_figure_has_its_command():
    first = TEXT.split('## What you can do')[0].splitlines()
    assert len(first) <= 50
    assert max(map(len, first)) <= 80
    measured = '\n'.join(first).split('Measured', 1)[1].split('![')[0]
    rows = re.findall(r'^- \*\*.*?(?=^- \*\*|\Z)', measured, re.DOTALL | re.MULTILINE)
    assert len(rows) >= 4
    for row in rows:
        command = re.findall(r'`([^`]+)`$', row.strip())
        assert command, row
        target = re.findall(r'^make (\w+)', command[0])
        if target:
            assert f'\n{target[0]}:' in (ROOT / 'Makefile').read_text(encoding='utf-8'), row
        for path in re.findall(r'\S+\.(?:toml|py)', command[0]):
            assert (ROOT / path).is_file(), row


def test_the_figures_of_the_first_screen_are_those_of_their_pages():
    """What is kept of the runs says the same; ``make train`` and ``make bench`` depend on the machine."""
    recipes = (ROOT / 'docs/recipes.md').read_text(encoding='utf-8')
    for name, said in (('recall', r'\*\*(.+) to (.+)\*\* of pairs'), ('small-lm', r'\*\*(.+) to (.+) bits per byte\*\*')):
        table = recipes.split(f'<!-- recipe {name} -->')[1].split('<!-- end -->')[0]
        shown = [float(value) for value in re.findall(r'^\| [^|]+ \| ([\d.]+) \|', table, re.MULTILINE)]
        before, after = map(float, re.findall(said, TEXT)[0])
        assert before == pytest.approx(shown[0], abs=0.005), name
        assert any(after == pytest.approx(value, abs=0.005) for value in shown[1:]), name
    parity = (ROOT / 'docs/hugging_face.md').read_text(encoding='utf-8')
    worst = max(float(n) for n in re.findall(r'^\| [^|]+ \| (\d+(?:e-\d+)?) \|', parity, re.MULTILINE))
    assert worst <= float(re.findall(r'within (\d+e-\d+) in float32', TEXT)[0])
