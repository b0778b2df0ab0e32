"""Every keyword of every constructor is listed, described, and known to type checkers."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import x_transformers
from x_transformers import Decoder, TransformerWrapper, XTransformer
from x_transformers.flags import keywords
from x_transformers.flags.signature import ClassSignature
from x_transformers.module import Module
from x_transformers.saving.plain import OTHERS

ROOT = Path(__file__).parent.parent.parent


def models() -> list[Any]:
    """The classes whose constructors take keywords that they do not name."""
    found: dict[str, Any] = {}
    for name in [x_transformers.__name__, *(m.name for m in pkgutil.iter_modules(x_transformers.__path__, 'x_transformers.'))]:
        for thing in vars(import_module(name)).values():
            if isinstance(thing, type) and issubclass(thing, Module) and '__signature__' in vars(thing):
                found[thing.__name__] = thing
    return list(found.values())


MODELS = models()


def flags_annotation(cls: Any) -> str:
    *_, last = inspect.signature(cls.__init__).parameters.values()
    return str(last.annotation)


def test_there_are_many() -> None:
    assert {'Decoder', 'XTransformer', 'TransformerWrapper', 'FreeTransformer', 'Attention'} <= {m.__name__ for m in MODELS}
    assert len(MODELS) >= 18


@pytest.mark.parametrize('cls', MODELS, ids=lambda cls: cls.__name__)
def test_every_keyword_is_listed_typed_and_described(cls: Any) -> None:
    assert isinstance(vars(cls)['__signature__'], ClassSignature)
    listed = inspect.signature(cls).parameters
    assert not [p for p in listed.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    name = re.fullmatch(r'Unpack\[(\w+)\]', flags_annotation(cls))
    assert name, f'{cls.__name__}: **flags must be typed, Unpack[...] of flags/keywords.py'
    parameters = inspect.signature(cls.__init__).parameters.values()
    own = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {'self'}
    typed = set(get_type_hints(getattr(keywords, name[1])))
    assert typed | own == set(listed)
    assert not typed & own
    described = set(re.findall(r'^    (\w+) \(.*\): .+[.?]', inspect.getdoc(cls), re.MULTILINE))
    assert typed <= described


def test_prefixes_reach_help() -> None:
    listed = inspect.signature(XTransformer).parameters
    assert listed['dec_cross_attn_num_mem_kv'].default == 0
    assert listed['enc_num_tokens'].default is inspect.Parameter.empty
    assert 'dec_causal' not in listed
    assert 'enc_attn_qk_norm (bool = False): Unit-length' in XTransformer.__doc__
    assert Decoder.__doc__.startswith('A causal stack: each token attends to itself')
    assert 'causal (' not in Decoder.__doc__
    assert 'num_tokens (int): Size of the vocabulary.' in inspect.getdoc(TransformerWrapper)


# what a user builds by itself, at the top level or in a module of its own
BUILT = [thing for name in x_transformers.__all__ if isinstance(thing := getattr(x_transformers, name), type)]
BUILT += [getattr(import_module(module), name) for name, module in OTHERS.items()]


@pytest.mark.parametrize('thing', [thing for thing in BUILT if issubclass(thing, Module)], ids=lambda thing: thing.__name__)
def test_every_parameter_is_described(thing: Any) -> None:
    told = inspect.getdoc(thing) or ''
    missing = [name for name in inspect.signature(thing).parameters if not re.search(rf'\b{name}\b', told)]
    assert not missing, f'the docstring of {thing.__name__} says nothing of {missing}'


SNIPPET = """
from torch import nn
import x_transformers as xt
from x_transformers.free_transformer import FreeTransformer

stack = xt.Decoder(dim=8, depth=1, attn_qk_norm=True, attn_dropout=(0.0, 0.1), ff_glu=True)
xt.Decoder(dim=8, depth=1, attn_qk_nrom=True)  # wrong
xt.Decoder(dim=8, depth=1, ff_glu='yes')  # wrong
xt.Attention(8, kv_heads=2)
xt.Attention(8, kv_head=2)  # wrong
xt.FeedForward(8, swish=True)
xt.FeedForward(8, swish=1.5)  # wrong
xt.TransformerWrapper(num_tokens=3, max_seq_len=4, attn_layers=stack, l2norm_embed=True)
xt.TransformerWrapper(num_tokens=3, max_seq_len=4, attn_layers=stack, l2norm=True)  # wrong
xt.ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=stack, num_classes=2)
xt.ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=stack, classes=2)  # wrong
xt.ContinuousTransformerWrapper(attn_layers=stack, dim_in=3)
xt.ContinuousTransformerWrapper(attn_layers=stack, dim_inn=3)  # wrong
xt.MultiInputTransformerWrapper(max_seq_len=4, attn_layers=stack, emb_dim=8)
xt.MultiInputTransformerWrapper(max_seq_len=4, attn_layers=stack, emd_dim=8)  # wrong
xt.XValTransformerWrapper(num_tokens=3, max_seq_len=4, numerical_token_id=1, attn_layers=stack, emb_dim=8)
xt.XValTransformerWrapper(num_tokens=3, max_seq_len=4, numerical_token_id=1, attn_layers=stack, emb=8)  # wrong
sizes = {'enc_num_tokens': 3}
xt.XTransformer(
    dim=8, enc_num_tokens=3, enc_max_seq_len=4, dec_num_tokens=3, dec_max_seq_len=4, dec_cross_attn_dropout=0.1, enc_ff_glu=True
)
xt.XTransformer(dim=8, enc_num_tokens=3, enc_max_seq_len=4, dec_num_tokens=3)  # wrong
xt.XTransformer(dim=8, enc_num_tokens=3, enc_max_seq_len=4, dec_num_tokens=3, dec_max_seq_len=4, enc_gul=True)  # wrong
FreeTransformer(num_tokens=3, dim=8, dec_head_depth=1, dec_tail_depth=1, max_seq_len=4, ff_glu=True)
FreeTransformer(num_tokens=3, dim=8, dec_head_depth=1, dec_tail_depth=1, max_seq_len=4, ff_gul=True)  # wrong
xt.AutoregressiveWrapper(nn.Identity(), pad_value=3)
xt.AutoregressiveWrapper(nn.Identity(), pad_values=3)  # wrong
"""


@pytest.mark.slow
def test_a_type_checker_finds_wrong_keywords_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / 'snippet.py'
    path.write_text(SNIPPET, encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file', ROOT / 'pyproject.toml', path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    found = {int(number) for number in re.findall(r'snippet\.py:(\d+): error', done.stdout)}
    wrong = {number for number, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith('# wrong')}
    assert found == wrong, done.stdout + done.stderr
