"""What CONTRIBUTING asks of an idea is there: these tests name what is missing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from x_transformers.attention.assemble import BIASES
from x_transformers.attention.attend import ORDER
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels.base import CallFacts, Needs
from x_transformers.attention.kernels.choose import KERNELS
from x_transformers.attention.scores.base import Form, ScoreRule
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import SITUATIONS, TRAITS, flag
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.positions import ANY_POSITION_BIAS
from x_transformers.flags.scores import ScoreFlags
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.layers.choose import RESIDUALS
from x_transformers.layers.residual import ResidualPath
from x_transformers.norms import NORMS

ROOT = Path(__file__).parent.parent


def subclasses(cls: type) -> set[type]:
    found = set(cls.__subclasses__())
    return found.union(*(subclasses(child) for child in found)) if found else found


def test_every_score_rule_stands_in_the_order():
    rules = {rule for rule in subclasses(ScoreRule) if rule.__module__.startswith('x_transformers') and not subclasses(rule)}
    missing = [rule.__name__ for rule in rules if rule not in ORDER]
    assert not missing, f'{missing}: give each a line in ORDER of attention/attend.py'


@pytest.mark.parametrize('rule', ORDER, ids=lambda rule: rule.__name__)
def test_a_score_rule_is_complete(rule):
    assert rule.form in Form, f'{rule.__name__} has no form'
    flags = AttentionFlags.flag_fields()
    assert rule.is_on(ScoreFlags()) or rule.name in flags, f'{rule.__name__}: no flag is named {rule.name}'
    if rule.unfused is None:
        call = CallFacts('cuda', torch.bfloat16, True, False, 8, 8, 64, 64, ScoreShape(1024, 1024), causal=True)
        carried = any(not kernel.refusals(Needs.of((rule,)), call) for kernel in KERNELS[:-1])
        assert carried, f'{rule.__name__}: no fused kernel carries it, so that `unfused` must say why'


def test_every_score_flag_is_read_by_somebody():
    # flags make others of some of theirs; where they are only named, as in presets, nobody reads them
    text = '\n'.join(
        source if path.parent.name != 'flags' else ' '.join(re.findall(r'\.(\w+)', source))
        for path in (ROOT / 'src/x_transformers').rglob('*.py')
        for source in (path.read_text(encoding='utf-8'),)
    )
    names = [name for cls in (AttentionFlags, StackFlags) for name in cls.flag_fields()]
    # norms are read by the names of their registry, position biases as the one that is on
    by_name = {*(f'use_{name}' for name in NORMS), *ANY_POSITION_BIAS}
    # a switch that needs a width is read as the width, which is at its default while the switch is off
    by_name |= {
        name for cls in (AttentionFlags, StackFlags) for name, field in cls.flag_fields().items() if field.metadata['needs']
    }
    unread = [name for name in names if name not in by_name and not re.search(rf'\b{name}\b', text)]
    assert not unread, f'{unread}: no part reads these flags'


def test_every_residual_and_norm_has_a_flag_and_a_line():
    paths = {path for path in subclasses(ResidualPath) if path.__module__.startswith('x_transformers')}
    # what several share is not made of flags itself
    paths = {path for path in paths if path.from_flags.__func__ is not ResidualPath.from_flags.__func__}
    missing = [path.__name__ for path in paths if path not in RESIDUALS]
    assert not missing, f'{missing}: give each a line in RESIDUALS of layers/choose.py'
    # a residual that needs two flags is named by what they make together, which is no flag
    named = {path.name for path in RESIDUALS[:-1] if path.name in StackFlags.flag_fields()}
    derived = {path.name for path in RESIDUALS[:-1]} - named
    assert all(isinstance(getattr(StackFlags, name), property) for name in derived), f'{derived}: no flag is named so'
    assert named == set(StackFlags.one_of('residual')), "a residual's flag says one_of='residual'"
    norms = {name.removeprefix('use_') for name in StackFlags.one_of('norm')}
    assert norms == set(NORMS) - {'layernorm'}, "a norm's flag is named use_... and says one_of='norm'"


def test_every_bias_of_a_layer_is_built_from_flags():
    for name, build in BIASES.items():
        assert build(8, AttentionFlags()) is None, f'{name} must be off by default'


# ---------------------------------------------------------------- what is true of a flag stands at the flag


def flag_lists(tree: ast.AST, flags: set[str]) -> Iterator[tuple[str, ...]]:
    """Tuples, lists and sets of at least three strings, all of them names of flags."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            names = [entry.value for entry in node.elts if isinstance(entry, ast.Constant) and isinstance(entry.value, str)]
            if len(names) == len(node.elts) >= 3 and flags.issuperset(names):
                yield tuple(names)


def test_no_module_lists_flags_beside_their_fields():
    parts = {prefix + name for prefix in ('', 'attn_') for name in AttentionFlags.flag_fields()}
    flags = parts | {prefix + name for prefix in ('', 'ff_') for name in FeedForwardFlags.flag_fields()}
    flags |= set(StackFlags.flag_fields())
    assert list(flag_lists(ast.parse("names = ('selective', 'attn_path', 'mudd')"), flags))
    package = ROOT / 'src/x_transformers'
    # kernels name the rules that they carry, and refuse all others
    paths = [path for path in package.rglob('*.py') if not {'flags', 'kernels'} & {*path.relative_to(package).parts}]
    assert len(paths) > 200
    found = {
        str(path.relative_to(package)): [*flag_lists(ast.parse(path.read_text(encoding='utf-8')), flags)] for path in paths
    }
    found = {path: lists for path, lists in found.items() if lists}
    assert not found, f'{found}: say it at the fields, as one of `one_of` or `traits` of flags/base.py'


@pytest.mark.parametrize('trait', TRAITS)
def test_every_trait_is_one_of_some_flag(trait):
    assert any(cls.having(trait) for cls in (AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags))


@pytest.mark.parametrize('situation', SITUATIONS)
def test_in_every_situation_some_flag_is_refused(situation):
    classes = AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags
    assert any(situation in field.metadata['refused'] for cls in classes for field in cls.flag_fields().values())


@pytest.mark.parametrize(
    ('said', 'words'),
    [
        ({'traits': 'own_key'}, 'traits must be among own_keys'),
        ({'one_of': 'norms'}, 'one_of must be among activation, head'),
        ({'refused': {'tensors': 'why'}}, 'refused must be among tensor, sequence parallel'),
    ],
)
def test_an_unknown_word_is_refused(said, words):
    with pytest.raises(ValueError, match=words):
        flag(False, 'One more.', **said)
