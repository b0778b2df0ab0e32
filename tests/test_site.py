"""The documentation site builds without a warning, and every flag has an address on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip('mkdocs', reason='the extra `site` is not installed')


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
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        import flag_pages
    finally:
        sys.path.pop(0)
    for title, _, cls, _ in flag_pages.SECTIONS:
        page = (site / 'flags' / flag_pages.page_name(title)).with_suffix('.html').read_text(encoding='utf-8')
        for name in cls.flag_fields():
            assert f'id="{flag_pages.full_name(cls, name)}"' in page, (title, name)


@pytest.mark.slow
@pytest.mark.parametrize('words', [('attn_kv_heads',), ('rope',), ('grouped-query',), ('alibi',)])
def test_search_finds(site: Path, words: tuple[str, ...]) -> None:
    entries = json.loads((site / 'search/search_index.json').read_text(encoding='utf-8'))['docs']
    found = [entry['location'] for entry in entries if all(word in (entry['title'] + entry['text']).lower() for word in words)]
    assert any(location.startswith('flags/') for location in found), found
