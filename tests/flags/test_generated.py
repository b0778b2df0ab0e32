"""What is generated from the flags is current: run `make docs` if one of these fails."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.scripts import load_script
from x_transformers.flags import keywords
from x_transformers.flags.parts import PARTS, keyword_names
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    'name', ['generate_keywords', 'generate_features', 'generate_kernels', 'generate_masks', 'generate_scaling']
)
def test_generated_files_are_current(name):
    module = load_script(f'tools/{name}.py')
    assert module.PATH.read_text(encoding='utf-8') == module.generated(), 'run `make docs`'


def test_typed_keywords_are_those_that_parse_accepts():
    typed = set(get_type_hints(keywords.StackKeywords)) | {'dim', 'depth', 'heads', 'causal'}
    assert typed == set(StackFlags.flag_fields()) | {name for part in PARTS for name in keyword_names(part)}
    required = {'num_tokens', 'max_seq_len', 'attn_layers'}
    assert set(get_type_hints(keywords.WrapperKeywords)) | required == set(WrapperFlags.flag_fields())


def test_every_flag_has_its_paper_or_is_said_to_have_none():
    module = load_script('tools/generate_features.py')
    flags = [(cls, name) for _, _, cls, _ in module.SECTIONS for name in cls.flag_fields()]
    assert len(flags) >= 300
    text = module.generated()
    for cls, name in flags:
        row = module.row(cls, name)
        assert row in text
        cell = row.removesuffix(' |').split(' | ')[4]
        links = re.findall(r'\[[^\]]+\]\((https?://[^)]+)\)', cell)
        assert links or cell == 'no paper', name
        assert links or not cls.flag_fields()[name].metadata['paper'], name


def test_the_version_is_that_of_the_interface():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    version = Version(project['version'])
    assert version.base_version == '2.31.10'
    for wish in ('x-transformers>=2.20', 'x-transformers>=2.31.10', 'x-transformers~=2.31', 'x-transformers<3'):
        assert Requirement(wish).specifier.contains(version), wish
    for name in ('README.md', 'CHANGELOG.md', 'docs/migrating.md'):
        assert version.base_version in (ROOT / name).read_text(encoding='utf-8'), name


def test_every_flag_and_every_rule_is_in_the_documentation():
    module = load_script('tools/generate_features.py')
    text = module.PATH.read_text(encoding='utf-8')
    for _, _, cls, rules in module.SECTIONS:
        for name in cls.flag_fields():
            assert f'| `{name}` |' in text
        for rule in rules:
            assert module.rule_line(rule) in text
