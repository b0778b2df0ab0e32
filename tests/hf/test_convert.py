"""Folders in the Hugging Face format: refused configs, broken files, shards, home-made models, the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.cli.main import main
from x_transformers.flags.base import FlagError
from x_transformers.hf import explain, from_hf, keywords, to_hf
from x_transformers.hf.convert import FAMILIES, copy_tokenizer
from x_transformers.hf.llama import LLAMA
from x_transformers.saving import tensors
from x_transformers.saving.errors import FolderError
from x_transformers.saving.plain import from_plain
from x_transformers.saving.tensors import Weights

CONFIG = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 20,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 4, 'hidden_act': 'silu',
    'max_position_embeddings': 64, 'rms_norm_eps': 1e-5, 'rope_theta': 5e5, 'tie_word_embeddings': False,
    'torch_dtype': 'float32', 'transformers_version': '4.40.0', 'use_cache': True, 'bos_token_id': 1, 'eos_token_id': 2,
    'attention_bias': False, 'mlp_bias': False, 'initializer_range': 0.02, 'pretraining_tp': 1, 'attention_dropout': 0.0,
}  # fmt: skip


def home_made(**flags):
    """A model of ours that is a Llama."""
    torch.manual_seed(0)
    stack = {
        'dim': 16, 'depth': 2, 'heads': 4, 'attn_dim_head': 4, 'attn_kv_heads': 2, 'use_rmsnorm': True,
        'norm_add_unit_offset': False, 'norm_eps': 1e-5, 'rotary_pos_emb': True, 'rotary_emb_dim': 4, 'rotary_theta': 5e5,
        'ff_glu': True, 'ff_swish': True, 'ff_no_bias': True, 'ff_glu_bias': False, 'ff_dim_inner': 20,
    } | flags  # fmt: skip
    model = TransformerWrapper(num_tokens=40, max_seq_len=64, attn_layers=Decoder(**stack)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    to_hf(home_made(), tmp_path / 'llama', family='llama')
    return tmp_path / 'llama'


def test_a_model_that_was_made_here_goes_out_and_comes_back(folder):
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_type'] == 'llama'
    assert 'model.layers.1.self_attn.q_proj.weight' in Weights(folder)
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(from_hf(folder)(ids), home_made()(ids))


def test_what_no_family_has_is_named(tmp_path):
    with pytest.raises(FlagError, match=r'llama does not have .*attention.gate_values=True') as caught:
        to_hf(home_made(attn_gate_values=True), tmp_path / 'model', family='llama')
    assert 'heads' not in str(caught.value).replace('attn_heads', '')
    assert not (tmp_path / 'model').exists()


def test_old_and_new_configs_say_the_same():
    new = {key: value for key, value in CONFIG.items() if key != 'rope_theta'}
    scaled = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
    old = CONFIG | {'rope_scaling': {'rope_type': 'llama3', **scaled}}
    new['rope_parameters'] = {'rope_theta': 5e5, 'rope_type': 'llama3', **scaled}
    assert keywords(old) == keywords(new)
    assert keywords(old)['attn_layers']['rotary_scaling']['type'] == 'llama3'
    older = CONFIG | {'rope_scaling': {'type': 'linear', 'factor': 2.0}}
    assert keywords(older)['attn_layers']['rotary_scaling'] == {'type': 'linear', 'factor': 2.0}


def test_explained_as_python():
    text = explain(CONFIG)
    namespace = {'TransformerWrapper': TransformerWrapper, 'Decoder': Decoder}
    model = eval(text, namespace)
    assert model.attn_layers.flags.rotary_theta == 5e5
    assert model.attn_layers.attn_dim_head == 4


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'model_type': 'mamba'}, r"`model_type` must be one of llama.* got 'mamba'"),
        ({'hidden_act': 'tanh'}, r'`hidden_act` is .tanh.: there is no flag for this activation'),
        ({'rope_scaling': {'type': 'su', 'factor': 2.0}}, r"`rope_type` is 'su'"),
        ({'quantization_config': {'bits': 4}}, r'`quantization_config` is .* which this family does not know'),
        ({'hidden_size': None}, r'`hidden_size` is missing'),
        ({'model_type': ['llama']}, r"`model_type` must be one of llama.* got \['llama'\]"),
        ({'hidden_size': '16'}, r"`hidden_size` must be a whole number above 0, got '16'"),
        ({'num_attention_heads': 0}, r'`num_attention_heads` must be a whole number above 0, got 0'),
        ({'num_key_value_heads': 3}, r'`num_key_value_heads` must divide `num_attention_heads`, 4, got 3'),
        ({'num_key_value_heads': 0}, r'`num_key_value_heads` must divide `num_attention_heads`, 4, got 0'),
        ({'rms_norm_eps': 'small'}, r"`rms_norm_eps` must be a number, or true or false, got 'small'"),
        ({'hidden_act': 3}, r'`hidden_act` must be a word, got 3'),
        ({'rope_scaling': 'linear'}, r"`rope_scaling` must be a table, got 'linear'"),
        ({'layer_types': 3, 'model_type': 'mistral', 'sliding_window': 4}, r'`layer_types` must be a list, got 3'),
        ({'rope_parameters': {'rope_theta': 'far'}}, r'`rope_parameters`, .*far.*, holds something that cannot be read'),
        ({'sliding_window': 'near', 'model_type': 'mistral'}, r"`sliding_window`, 'near', holds something that cannot be read"),
        ({'logits_scaling': 0, 'model_type': 'granite'}, r'`logits_scaling` is 0, and logits are divided by it'),
        ({'num_experts_per_tok': 1, 'model_type': 'mixtral'}, r'`num_experts_per_tok` is 1: shares that add up to one need'),
        ({'num_local_experts': 1, 'model_type': 'mixtral'}, r'`num_local_experts` must be 2 or more'),
        (
            {'max_position_embeddings': 2, 'model_type': 'roberta'},
            r'`max_position_embeddings` must be above `pad_token_id` \+ 1, 2, got 2',
        ),
        ({'rope_theta': [1.0]}, r'`rope_theta` must be a number, or true or false, got \[1.0\]'),
    ],
)
def test_configs_that_cannot_be_expressed_are_refused_by_key(change, says):
    with pytest.raises(FlagError, match=says):
        keywords(CONFIG | change)


def test_a_mistake_of_a_family_is_no_mistake_of_the_config(monkeypatch):
    def broken(config):
        return config.need('vocab_size') + 'x'

    family = dataclasses.replace(LLAMA, keywords=broken)
    monkeypatch.setattr('x_transformers.hf.llama.LLAMA', family)
    with pytest.raises(TypeError, match='unsupported operand'):
        keywords({'model_type': 'llama', 'vocab_size': 3})


def test_the_readme_counts_the_families():
    said = re.search(r'\*\*(\d+) families', (Path(__file__).parents[2] / 'README.md').read_text(encoding='utf-8'))
    assert said is not None
    assert int(said[1]) == len(set(FAMILIES.values()))


def test_two_norms_that_differ_do_not_become_one(tmp_path):
    config = {
        'model_type': 'gptj', 'architectures': ['GPTJForCausalLM'], 'vocab_size': 20, 'n_positions': 9, 'n_embd': 16,
        'n_layer': 1, 'n_head': 2, 'rotary_dim': 4,
    }  # fmt: skip
    model = from_plain(keywords(config))
    model.hf_config = config
    to_hf(model, tmp_path / 'one')
    ids = torch.arange(9)[None]
    torch.testing.assert_close(from_hf(tmp_path / 'one')(ids), model.eval()(ids))
    with torch.no_grad():
        model.attn_layers.layers[1].norms[0].gamma[3] += 0.1
    with pytest.raises(FlagError, match='the norms of attention and feed-forward must be equal in each block'):
        to_hf(model, tmp_path / 'two')
    assert [path.name for path in tmp_path.iterdir()] == ['one']


def rewrite(folder, change):
    held = dict(Weights(folder).items())
    change(held)
    tensors.write_tensors(folder, held.items(), metadata={'format': 'pt'})


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (lambda held: held.pop('model.norm.weight'), 'missing: model.norm.weight'),
        (lambda held: held.update(more=torch.zeros(2)), 'left over: more'),
        (
            lambda held: held.update({'model.layers.0.self_attn.k_proj.weight': torch.zeros(4, 16)}),
            r'of another shape: .*self_attn.k_proj.weight .*\(4, 16\)',
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_before_any_is_read(folder, change, says, monkeypatch):
    rewrite(folder, change)
    monkeypatch.setattr(tensors, 'read_tensor', lambda place: pytest.fail('a tensor was read'))
    with pytest.raises(FolderError, match=says):
        from_hf(folder)


def test_a_tied_head_that_is_none(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'tie_word_embeddings': True}))
    with pytest.raises(FolderError, match=r'ties lm_head.weight to model.embed_tokens.weight, but they differ'):
        from_hf(folder)
    rewrite(folder, lambda held: held.update({'lm_head.weight': held['model.embed_tokens.weight'].clone()}))
    assert from_hf(folder).flags.tie_embedding


def test_flags_that_do_not_fit_together_are_told_with_the_family(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'rms_norm_eps': -1.0}))
    with pytest.raises(FlagError, match=r'llama: the config becomes flags that do not fit together. `norm_eps=-1.0`'):
        from_hf(folder)


@pytest.mark.parametrize('factor', [float('nan'), float('inf'), 0.5])
def test_factors_that_are_no_numbers_are_refused(folder, factor):
    config = json.loads((folder / 'config.json').read_text())
    config['rope_parameters'] = {'rope_theta': 1e4, 'rope_type': 'linear', 'factor': factor}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(FlagError, match=r"llama: .*'factor' must be"):
        from_hf(folder)


@pytest.mark.parametrize(
    ('kind', 'says'),
    [
        (torch.int64, 'model.norm.weight must hold floating numbers, got torch.int64'),
        (torch.float8_e4m3fn, 'model.norm.weight is torch.float8_e4m3fn, in which no model computes. Give dtype'),
    ],
)
def test_weights_that_no_model_computes_with(folder, kind, says, tmp_path):
    rewrite(folder, lambda held: held.update({'model.norm.weight': held['model.norm.weight'].to(kind)}))
    with pytest.raises(FolderError, match=says):
        from_hf(folder)
    if kind.is_floating_point:
        model = from_hf(folder, dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(FolderError, match=r'dtype must be one of torch.float64, .*, got torch.int8'):
        from_hf(folder, dtype=torch.int8)
    home_made().save_pretrained(tmp_path / 'ours')
    rewrite(tmp_path / 'ours', lambda held: held.update({'attn_layers.final_norm.g': torch.ones(16).to(kind)}))
    with pytest.raises(FolderError, match=r'attn_layers.final_norm.g (must hold|is torch.float8)'):
        TransformerWrapper.from_pretrained(tmp_path / 'ours')


def test_a_missing_shard_is_named(folder):
    held = dict(Weights(folder).items())
    (folder / 'model.safetensors').unlink()
    tensors.write_tensors(folder, held.items(), metadata={'format': 'pt'}, shard=4000)
    whole = from_hf(folder)
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(whole(ids), home_made()(ids))
    gone = sorted(folder.glob('model-*.safetensors'))[1]
    gone.unlink()
    with pytest.raises(FolderError, match=f'lacks {gone.name}'):
        from_hf(folder)


def test_dtype_and_a_folder_of_ours(folder, tmp_path):
    model = from_hf(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.attn_layers.rotary_pos_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path / 'ours')
    with pytest.raises(FolderError, match='Use from_pretrained'):
        from_hf(tmp_path / 'ours')
    with pytest.raises(FolderError, match=r'use x_transformers.hf.from_hf'):
        TransformerWrapper.from_pretrained(folder)


def tokenizer(folder):
    tokenizers = pytest.importorskip('tokenizers', reason='text needs tokenizers (extra: hf)')
    words = {f'w{number}': number for number in range(40)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / 'tokenizer.json'))
    return made


def test_the_command_line_explains_imports_writes_and_exports(folder, tmp_path, capsys):
    made = tokenizer(folder)
    config = json.loads((folder / 'config.json').read_text())
    assert main(['hf', 'explain', str(folder)]) == 0
    assert 'rotary_theta=500000.0' in capsys.readouterr().out
    assert main(['hf', 'import', str(folder), str(tmp_path / 'ours')]) == 0
    assert 'tokenizer.json' in capsys.readouterr().out
    prompt = ['--prompt', 'w3 w4', '--length', '6', '--temperature', '0']
    assert main(['generate', str(tmp_path / 'ours'), *prompt]) == 0
    said = capsys.readouterr().out
    wanted = AutoregressiveWrapper(home_made()).generate(torch.tensor([[3, 4]]), 6, temperature=0.0)[0].tolist()
    assert said.split() == ['w3', 'w4', *made.decode(wanted).split()]
    assert main(['hf', 'export', str(tmp_path / 'ours'), str(tmp_path / 'theirs')]) == 0
    assert json.loads((tmp_path / 'theirs/config.json').read_text()) == config
    one, other = Weights(folder), Weights(tmp_path / 'theirs')
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert main(['hf', 'import', str(tmp_path / 'none'), str(tmp_path / 'x')]) == 2
    assert 'has no config.json' in capsys.readouterr().err


def test_a_tokenizer_of_the_model_before_does_not_stay(tmp_path: Path) -> None:
    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    target.mkdir()
    (source / 'tokenizer.json').write_text('new')
    for name in ('tokenizer.json', 'merges.txt', 'notes.txt'):
        (target / name).write_text('old')
    assert copy_tokenizer(source, target) == ['tokenizer.json']
    assert {path.name: path.read_text() for path in target.iterdir()} == {'tokenizer.json': 'new', 'notes.txt': 'old'}
