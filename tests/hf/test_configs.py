"""Every key of a family's config, at other values than the usual: it is expressed, or it is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.hf.published import (
    BERT,
    DECODER,
    DISTILBERT,
    FALCON,
    GEMMA3,
    GPT2,
    GPT_OSS,
    GPTJ,
    GRANITE,
    IMAGES,
    LIMIT,
    MIXTRAL,
    MODERNBERT,
    NEOX,
    OLMO3,
    QWEN2_MOE,
    QWEN_MOE,
    ROBERTA,
    T5,
    TOKENS,
    WHISPER,
    build,
    gap,
    inputs,
    noisy,
    ours,
    read,
    whisper_encoder,
)
from x_transformers.flags.base import FlagError
from x_transformers.hf import from_hf

transformers = pytest.importorskip('transformers', reason='the models to compare with are those of transformers (extra: dev)')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

# the class of the model, that of its config, the keywords that it differs from
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    'Llama': ('LlamaForCausalLM', 'LlamaConfig', DECODER),
    'Mistral': ('MistralForCausalLM', 'MistralConfig', {**DECODER, 'sliding_window': 5}),
    'Ministral': ('MinistralForCausalLM', 'MinistralConfig', {**DECODER, 'sliding_window': 5, 'head_dim': 8}),
    'Qwen2': ('Qwen2ForCausalLM', 'Qwen2Config', DECODER),
    'Qwen3': ('Qwen3ForCausalLM', 'Qwen3Config', {**DECODER, 'head_dim': 8}),
    'Gemma': ('GemmaForCausalLM', 'GemmaConfig', {**DECODER, 'head_dim': 8}),
    'Gemma 2': ('Gemma2ForCausalLM', 'Gemma2Config', {**DECODER, 'head_dim': 8, 'sliding_window': 5}),
    'Gemma 3': ('Gemma3ForCausalLM', 'Gemma3TextConfig', {**DECODER, **GEMMA3}),
    'Mixtral': ('MixtralForCausalLM', 'MixtralConfig', {**DECODER, **MIXTRAL}),
    'Qwen2-MoE': ('Qwen2MoeForCausalLM', 'Qwen2MoeConfig', {**DECODER, **QWEN2_MOE}),
    'Qwen3-MoE': ('Qwen3MoeForCausalLM', 'Qwen3MoeConfig', {**DECODER, **QWEN_MOE}),
    'Granite': ('GraniteForCausalLM', 'GraniteConfig', {**DECODER, **GRANITE}),
    'SmolLM3': ('SmolLM3ForCausalLM', 'SmolLM3Config', {**DECODER, 'num_hidden_layers': 4}),
    'OLMo 2': ('Olmo2ForCausalLM', 'Olmo2Config', DECODER),
    'OLMo 3': ('Olmo3ForCausalLM', 'Olmo3Config', {**DECODER, **OLMO3}),
    'OLMoE': ('OlmoeForCausalLM', 'OlmoeConfig', {**DECODER, **MIXTRAL}),
    'Phi': ('PhiForCausalLM', 'PhiConfig', DECODER),
    'GPT-J': ('GPTJForCausalLM', 'GPTJConfig', GPTJ),
    'Phi-3': ('Phi3ForCausalLM', 'Phi3Config', DECODER),
    'StarCoder2': ('Starcoder2ForCausalLM', 'Starcoder2Config', DECODER),
    'gpt-oss': ('GptOssForCausalLM', 'GptOssConfig', {**DECODER, **GPT_OSS}),
    'Falcon': ('FalconForCausalLM', 'FalconConfig', FALCON),
    'Falcon, new': (
        'FalconForCausalLM', 'FalconConfig', {**FALCON, 'new_decoder_architecture': True, 'num_kv_heads': 2},
    ),
    'GPT-2': ('GPT2LMHeadModel', 'GPT2Config', GPT2),
    'GPT-NeoX': ('GPTNeoXForCausalLM', 'GPTNeoXConfig', NEOX),
    'BERT': ('BertForMaskedLM', 'BertConfig', BERT),
    'RoBERTa': ('RobertaForMaskedLM', 'RobertaConfig', ROBERTA),
    'DistilBERT': ('DistilBertForMaskedLM', 'DistilBertConfig', DISTILBERT),
    'ModernBERT': ('ModernBertForMaskedLM', 'ModernBertConfig', MODERNBERT),
    'T5': ('T5ForConditionalGeneration', 'T5Config', T5),
    'Whisper': ('WhisperEncoder', 'WhisperConfig', WHISPER),
    'ViT': ('ViTForImageClassification', 'ViTConfig', {**IMAGES, 'intermediate_size': 44}),
    'DINOv2': ('Dinov2WithRegistersForImageClassification', 'Dinov2WithRegistersConfig', IMAGES),
}  # fmt: skip

# about files, ids and what is returned
OTHERS = re.compile(
    r'architectures|\w+2\w+|problem_type|_name_or_path|return_dict|output_\w+|dtype|is_encoder_decoder|\w+_token_id'
    r'|transformers_version|chunk_size_feed_forward'
)
ACTIVATIONS = [
    'gelu',
    'gelu_new',
    'relu',
    'silu',
    'tanh',
    'quick_gelu',
    'gelu_pytorch_tanh',
    'relu2',
    'mish',
    'linear',
    'gelu_10',
]
FACTORS = {'short_factor': [1.0, 1.1, 1.2, 1.3], 'long_factor': [2.0, 3.0, 4.0, 5.0], 'original_max_position_embeddings': 16}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
ROPES: list[dict[str, Any]] = [
    {'rope_theta': 500.0, **more}
    for more in (
        {'rope_type': 'default'},
        {'rope_type': 'default', 'partial_rotary_factor': 0.5},
        {'rope_type': 'linear', 'factor': 3.0},
        {'rope_type': 'linear', 'factor': 3.0, 'partial_rotary_factor': 0.5},
        {'rope_type': 'dynamic', 'factor': 3.0},
        {'rope_type': 'dynamic', 'factor': 3.0, 'original_max_position_embeddings': 16},
        {**YARN, 'beta_fast': 20.0, 'beta_slow': 2.0},
        {**YARN, 'attention_factor': 1.3},
        {**YARN, 'mscale': 0.7, 'mscale_all_dim': 1.3},
        {**YARN, 'truncate': False},
        {'rope_type': 'yarn', 'factor': 4.0},
        {**LLAMA3, 'original_max_position_embeddings': 16},
        {**LLAMA3, 'original_max_position_embeddings': 64},
        {'rope_type': 'longrope', **FACTORS, 'factor': 4.0},
        {'rope_type': 'longrope', **FACTORS},
        {'rope_type': 'longrope', **FACTORS, 'attention_factor': 1.2},
        {'rope_type': 'proportional', 'partial_rotary_factor': 0.5},
    )
]
FULL, SLIDING = 'full_attention', 'sliding_attention'
VALUES: dict[str, list[Any]] = {
    'rope_parameters': [*ROPES, {FULL: ROPES[2], SLIDING: ROPES[0]}, {FULL: ROPES[1], SLIDING: ROPES[0]}],
    'rope_scaling': [{'type': 'linear', 'factor': 2.0}, {'rope_type': 'dynamic', 'factor': 2.0}, {**YARN, 'type': 'yarn'}],
    'rope_theta': [300.0],
    'partial_rotary_factor': [0.5],
    'layer_types': [[FULL, SLIDING, FULL, SLIDING], [SLIDING] * 4, [FULL] * 4, ['chunked_attention', FULL, FULL, FULL]],
    'head_dim': [8, 12],
    'hidden_size': [40, 64],
    'num_attention_heads': [2, 8],
    'num_key_value_heads': [1, 4],
    'num_kv_heads': [1, 2, 4],
    'num_ln_in_parallel_attn': [1, 2],
    'attn_logit_softcapping': [2.0, None],
    'final_logit_softcapping': [3.0, None],
    'query_pre_attn_scalar': [8, 100],
    'sliding_window': [3, None],
    'max_window_layers': [0, 1, 5],
    'sliding_window_pattern': [3],
    'rope_local_base_freq': [50.0],
    'global_rope_theta': [50.0],
    'local_rope_theta': [5.0],
    'global_attn_every_n_layers': [2],
    'no_rope_layers': [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1, 0]],
    'no_rope_layer_interval': [2, 3, 9],
    'rotary_pct': [0.3, 0.5, 1.0],
    'rotary_emb_base': [300],
    'n_inner': [50],
    'rotary_dim': [2, 6, 8, 7],
    'feed_forward_proj': ['relu', 'gelu', 'silu', 'gated-gelu', 'gated-silu', 'gated-relu', 'gated-gelu_new', 'gated-tanh'],
    'num_decoder_layers': [3],
    'image_size': [(8, 16), 8],
    'patch_size': [8, (4, 8)],
    'position_embedding_type': ['relative_key'],
    'use_bidirectional_attention': [True],
    'num_register_tokens': [0, 1, 3],
    'num_experts_per_tok': [1, 3],
    'mlp_only_layers': [[0], [1, 2], [0, 1, 2]],
    'decoder_sparse_step': [2, 3, 4],
    'relative_attention_max_distance': [7, 40],
}
# keys of older configs, which the classes turn into others
OLDER = {
    'Llama': ('rope_theta', 'rope_scaling', 'partial_rotary_factor', 'head_dim'),
    'Qwen2': ('rope_theta', 'rope_scaling'),
    'Gemma 3': ('rope_theta', 'rope_scaling', 'rope_local_base_freq', 'sliding_window_pattern'),
    'GPT-NeoX': ('rotary_pct', 'rotary_emb_base', 'rope_scaling'),
    'ModernBERT': ('global_rope_theta', 'local_rope_theta', 'global_attn_every_n_layers', 'rope_scaling'),
}


def other_values(name: str, usual: Any) -> list[Any]:
    if name in VALUES:
        return VALUES[name]
    if 'act' in name.split('_') or name.endswith('activation') or name == 'activation_function':
        return ACTIVATIONS
    if isinstance(usual, bool):
        return [not usual]
    if isinstance(usual, int):
        return [2 * usual, usual + 1]
    if isinstance(usual, float):
        return [3 * usual + 0.07]
    return [True, 3] if usual is None else ['zzz'] if isinstance(usual, str) else []


def changes_of(model: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(key, value, keywords of the config): one key after the other at another value."""
    _, config, base = MODELS[model]
    keys = {f.name: f.default for f in dataclasses.fields(getattr(transformers, config))}
    keys |= dict.fromkeys(OLDER.get(model, ()))
    for name, usual in keys.items():
        if OTHERS.fullmatch(name):
            continue
        for value in other_values(name, base.get(name, usual)):
            changed = {**copy.deepcopy(base), name: copy.deepcopy(value)}
            if name == 'layer_types':
                changed['layer_types'] = value[: changed['num_hidden_layers']]
            if model.startswith('Qwen') and name in ('layer_types', 'use_sliding_window', 'max_window_layers'):
                changed |= {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': changed.get(name, 1)
                            if name == 'max_window_layers' else 1}  # fmt: skip
            yield name, value, changed


def theirs_of(model: str, keywords: dict[str, Any]) -> Any:
    """Their model, or None where transformers itself has no such model."""
    cls, config, _ = MODELS[model]
    try:
        made = noisy(whisper_encoder(keywords) if model == 'Whisper' else build(cls, config, keywords))
        with torch.no_grad():
            made(**inputs(made))
    except Exception:
        return None
    return made


@torch.no_grad()
def outcome(model: str, name: str, value: Any, changed: dict[str, Any]) -> str:
    """'theirs': they have no such model; 'same'; 'refused'; or what is wrong."""
    theirs = theirs_of(model, changed)
    if theirs is None:
        return 'theirs'
    given = inputs(theirs)
    if 'longrope' in str(value):
        # theirs counts the padding of a row, too
        given['attention_mask'] = torch.ones_like(given['input_ids'])
    try:
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            mine = from_hf(folder)
    except FlagError as error:
        known = {name, *re.findall(r"'(\w+)'", str(value)), *vars(theirs.config)}
        named = set(re.findall(r'`(\w+)`', str(error)))
        return 'refused' if named & known else f'{name}={value!r} is refused without its name: {error}'
    output = theirs(**given)
    apart = gap(read(output), ours(mine, given, 'logits' not in output), given)
    return 'same' if apart < LIMIT else f'{name}={value!r} differs by {apart:.2g}'


@pytest.mark.parametrize('model', MODELS)
def test_each_key_is_expressed_or_refused_by_its_name(model: str) -> None:
    found = [outcome(model, *change) for change in changes_of(model)]
    assert [what for what in found if what not in ('same', 'refused', 'theirs')] == []
    assert found.count('same') > 10


def test_stretched_frequencies_beyond_the_longest_sequence() -> None:
    """Of configs that say how long the sequences of the training were, and of those that do not."""
    for rope in ({'factor': 3.0}, {'factor': 3.0, 'original_max_position_embeddings': 8}):
        theirs = noisy(build('LlamaForCausalLM', 'LlamaConfig', DECODER | {
            'max_position_embeddings': 16, 'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 500.0, **rope},
        }))  # fmt: skip
        mine = from_hf(theirs)
        assert mine.max_seq_len == 48
        for length in (9, 16, 17, 40):
            ids = torch.randint(TOKENS, (1, length))
            torch.testing.assert_close(mine(ids), theirs(ids).logits, atol=LIMIT, rtol=0)


@pytest.mark.parametrize(
    ('cls', 'config', 'base'),
    [
        ('LlamaForSequenceClassification', 'LlamaConfig', DECODER),
        ('BertForTokenClassification', 'BertConfig', BERT),
        ('RobertaForCausalLM', 'RobertaConfig', ROBERTA),
        ('DistilBertForQuestionAnswering', 'DistilBertConfig', DISTILBERT),
        ('GPT2DoubleHeadsModel', 'GPT2Config', GPT2),
        ('ModernBertForQuestionAnswering', 'ModernBertConfig', MODERNBERT),
    ],
)
def test_other_heads_are_refused(cls: str, config: str, base: dict[str, Any]) -> None:
    with pytest.raises(FlagError, match=f'`architectures` is {cls}'):
        from_hf(build(cls, config, base))
