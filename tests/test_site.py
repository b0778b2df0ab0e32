"""The documentation site builds without a warning, and every flag has an address on it."""

from __future__ import annotations

import html
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from x_transformers import Attention, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers

ROOT = Path(__file__).parent.parent
pytest.importorskip('mkdocs', reason='the extra `site` is not installed')


def tool(name: str) -> Any:
    """A module of tools/, which is no package."""
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('site')
    environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1', 'PYTHONPATH': str(ROOT / 'src')}
    command = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--strict', '--site-dir', str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_flag_has_an_anchor_under_its_full_name(site: Path) -> None:
    flag_pages = tool('flag_pages')
    for title, _, cls, _ in flag_pages.SECTIONS:
        for name in cls.flag_fields():
            page = flag_pages.page_name(title, flag_pages.family_of(cls, name))
            text = (site / 'flags' / page).with_suffix('.html').read_text(encoding='utf-8')
            assert f'id="{flag_pages.full_name(cls, name)}"' in text, (title, name)


@pytest.mark.slow
def test_flag_pages_link_to_guides(site: Path) -> None:
    text = (site / 'flags' / 'attention_weights.html').read_text(encoding='utf-8')
    assert 'href="../per_layer.html"' in text
    assert '.md</code>' not in text


def test_a_sub_option_names_the_paper_of_what_it_belongs_to() -> None:
    flag_pages, features = tool('flag_pages'), tool('generate_features')
    flags = features.AttentionFlags
    parent, part = (flags.flag_fields()[name].metadata['paper'] for name in ('gumbel_softmax', 'gumbel_softmax_temp'))
    assert parent
    assert part is None
    assert features.paper_link(parent) in '\n'.join(flag_pages.section(flags, (), 'gumbel_softmax_temp', 1))


def test_where_flags_have_families_each_has_one() -> None:
    features = tool('generate_features')
    for cls in features.DIVIDED:
        assert None not in features.families(cls), features.families(cls)[None]


@pytest.mark.slow
@pytest.mark.parametrize('words', ['attn_kv_heads', 'rope', 'grouped query', 'alibi', 'mixture of experts'])
def test_search_finds_flags(site: Path, words: str) -> None:
    assert any(location.startswith('flags/') for location in found_by(site, words))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('words', 'page'),
    [
        ('small language model', 'recipes.html'),
        ('pack sequences train', 'packing.html'),
        ('decode loop', 'caches.html'),
        ('torchrun', 'scaling.html'),
        ('llama weights', 'hugging_face.html'),
        ('export dynamic length', 'export.html'),
        ('own block', 'own_modules.html'),
        ('original', 'migrating.html'),
        ('evaluate', 'evaluation.html'),
    ],
)
def test_search_leads_to_the_page_that_answers(site: Path, words: str, page: str) -> None:
    assert any(location.startswith(page) for location in found_by(site, words))


def found_by(site: Path, words: str) -> list[str]:
    """The sections that hold all the words, as the search of the site splits them."""
    entries = json.loads((site / 'search/search_index.json').read_text(encoding='utf-8'))['docs']
    wanted = words.lower().split()
    found = []
    for entry in entries:
        text = re.sub('<[^>]*>', ' ', f'{entry["title"]} {entry["text"]}').lower()
        if all(re.search(rf'\b{re.escape(word)}', text) for word in wanted):
            found.append(entry['location'])
    return found


def plain(text: str) -> str:
    """The words alone, without marks of code and breaks of lines."""
    return ' '.join(text.replace('`', '').split())


@pytest.mark.slow
def test_the_reference_says_what_arguments_of_forwards_do(site: Path) -> None:
    tags = re.compile('<[^>]*>')
    text = plain(html.unescape(tags.sub('', (site / 'api.html').read_text(encoding='utf-8'))))
    for forward in (Attention.forward, AttentionLayers.forward, TransformerWrapper.forward):
        told = re.findall(r'^    \w+: (.+(?:\n {8}.+)*)', forward.__doc__ or '', re.MULTILINE)
        assert len(told) > 15
        for sentence in told:
            assert plain(sentence) in text, sentence
    assert 'as declared in' not in text


@pytest.mark.slow
def test_the_page_to_try_flags_out_tells_what_info_tells(site: Path) -> None:
    explore = tool('explore')
    page = (site / 'explore.html').read_text(encoding='utf-8')
    data = json.loads(re.findall(r'id="explore-data">(.*?)</script>', page, re.DOTALL)[0])
    for name in ('keys', 'positions', 'window', 'forward', 'norm', 'scheme'):
        assert len(data['choices'][name]) >= 2
    rng = random.Random(0)
    for _ in range(12):
        chosen = {name: rng.choice(list(options)) for name, options in data['choices'].items()}
        width, depth = rng.choice(list(data['widths'])), rng.randint(1, 3)
        flags = {key: value for name, option in chosen.items() for key, value in data['choices'][name][option].items()}
        told = explore.figures(data['widths'][width], depth, flags)
        found = data['measured'][width]
        parts = (
            found['attention']['|'.join(chosen[name] for name in ('keys', 'positions', 'window'))],
            found['added'][f'{chosen["scheme"]}|{chosen["forward"]}'],
            found['added'][chosen['norm']],
        )
        for n, value in enumerate(told):
            assert sum(depth * block[n] + ends[n] for block, ends in parts) == pytest.approx(value, rel=1e-9), (chosen, n)


def test_a_block_is_drawn_for_each_residual_scheme() -> None:
    diagrams = tool('block_diagrams')
    for name, scheme in diagrams.SCHEMES.items():
        svg = diagrams.diagram(scheme)
        branches = sum(len(part) for part in scheme.steps if isinstance(part, tuple))
        assert svg.count('feed-forward') + svg.count('attention') == branches, name
        numbers = [float(number) for number in re.findall(r'[xy]="(-?[\d.]+)"', svg)]
        assert min(numbers) >= 0, name
