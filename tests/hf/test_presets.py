"""Models of presets that are named after families leave as models of these families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.cli.main import main
from x_transformers.flags.base import FlagError
from x_transformers.flags.presets import preset
from x_transformers.hf import from_hf, to_hf
from x_transformers.saving.tensors import json_object
from x_transformers.training.build import split_flags
from x_transformers.training.run import tokenizer_of

WHOLE = {'rotary_whole_head': True}


def made(name: str, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    wrapper, stack = split_flags(preset(name) | {'dim': 128, 'depth': 2, 'heads': 2, 'verbose': False, **flags})
    model = TransformerWrapper(num_tokens=40, max_seq_len=64, **wrapper, attn_layers=Decoder(**stack)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    ('name', 'family', 'flags'),
    [
        ('hf-llama', 'llama', {}),
        ('hf-llama', 'llama', {'tie_embedding': True, 'attn_kv_heads': 1, 'attn_dim_head': 48}),
        ('hf-llama', 'mistral', {'attn_max_attend_past': 7}),
        ('llama', 'llama', WHOLE),
        ('llama', 'llama', {**WHOLE, 'attn_qkv_bias': True, 'attn_out_bias': True, 'attn_one_kv_head': True}),
        ('quickstart', 'llama', WHOLE),
        ('gpt2', 'gpt2', {}),
        ('gpt2', 'gpt2', {'ff_custom_activation': 'relu', 'ff_dim_inner': 100, 'tie_embedding': False}),
    ],
)
def test_a_model_of_a_preset_goes_out_and_comes_back(name: str, family: str, flags: dict[str, Any], tmp_path: Path) -> None:
    model, ids = made(name, **flags), torch.randint(40, (2, 30))
    to_hf(model, tmp_path / 'theirs')
    assert json_object(tmp_path / 'theirs/config.json')['model_type'] == family
    torch.testing.assert_close(from_hf(tmp_path / 'theirs')(ids), model(ids), atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ('name', 'flags', 'says'),
    [
        ('llama', {}, r'llama does not have attn_layers.rotary_emb_dim=32 \(it would be 64\)'),
        ('modern', WHOLE, r'llama does not have attn_layers.attention.qk_norm=True'),
        ('gpt2', {'attn_dim_head': 32}, r'gpt2 does not have attn_layers.attention.dim_head=32'),
        ('hf-llama', {'ff_mult': (2.0, 3.0)}, r'ff_mult must be one value for all layers, got .*2.0, 3.0'),
    ],
)
def test_what_stands_in_the_way_is_named(name: str, flags: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=says) as caught:
        to_hf(made(name, **flags), tmp_path / 'theirs')
    assert 'cross_attention' not in str(caught.value)
    with pytest.raises(FlagError, match=r'no family has this model\. There is no config of bert'):
        to_hf(made('llama'), tmp_path / 'theirs', family='bert')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe'])
def test_what_was_trained_is_read_by_transformers(tokenizer: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers', reason='it reads what goes out (extra: dev)')
    text = (Path(__file__).parents[2] / 'docs/architecture.md').read_text(encoding='utf-8')
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    sizes = {'dim': 64, 'depth': 2, 'heads': 2, 'steps': 25, 'batch': 4, 'seq-len': 64, 'max-seq-len': 128}
    run, theirs = tmp_path / 'run', tmp_path / 'theirs'
    words = {'tokenizer': 'bpe', 'vocab': 300} if tokenizer == 'bpe' else {}
    given = {'preset': 'hf-llama', **sizes, **words, 'data': tmp_path / 'text.txt', 'run-dir': run}
    assert main(['train', *(part for name, value in given.items() for part in (f'--{name}', str(value)))]) == 0
    assert main(['hf', 'export', str(run), str(theirs)]) == 0
    mine = AutoregressiveWrapper.from_pretrained(run)
    other = transformers.AutoModelForCausalLM.from_pretrained(theirs).eval()
    their_words = transformers.AutoTokenizer.from_pretrained(theirs)
    said = 'Words, ümlauts\nand  `code`: 12'
    ids = list(tokenizer_of(run).encode([said.encode()])[0])
    assert their_words(said)['input_ids'] == ids
    assert their_words.decode(ids) == said
    with torch.no_grad():
        torch.testing.assert_close(other(torch.tensor([ids])).logits, mine.net(torch.tensor([ids])), atol=1e-4, rtol=0)
    written = mine.generate(torch.tensor([ids]), 64, temperature=0.0)
    assert torch.equal(other.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[:, len(ids) :], written)
