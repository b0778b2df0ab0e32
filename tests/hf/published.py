"""Small models of published families, with random weights, and how far ours are from them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 1e-4
TOKENS, LENGTH, STEPS = 61, 21, 64


@dataclass(frozen=True)
class Case:
    """``make`` builds a model of ``transformers``; ``writes``: it generates text."""

    name: str
    make: Callable[[], Any]
    writes: bool = False
    limit: float = LIMIT


DECODER = {
    'vocab_size': TOKENS, 'hidden_size': 32, 'intermediate_size': 44, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 128, 'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2,
}  # fmt: skip


def decoder(name: str, cls: str, config: str, **changes: Any) -> Case:
    return Case(name, lambda: build(cls, config, DECODER | changes), writes=True)


def neox(name: str, **changes: Any) -> Case:
    return Case(name, lambda: build('GPTNeoXForCausalLM', 'GPTNeoXConfig', NEOX | changes), writes=True)


def falcon(name: str, **changes: Any) -> Case:
    return Case(name, lambda: build('FalconForCausalLM', 'FalconConfig', FALCON | changes), writes=True)


def build(cls: str, config: str, keywords: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**keywords))


def other(name: str, cls: str, config: str, **keywords: Any) -> Case:
    return Case(name, lambda: build(cls, config, keywords))


LLAMA = ('LlamaForCausalLM', 'LlamaConfig')
BERT = {
    'vocab_size': TOKENS, 'hidden_size': 32, 'intermediate_size': 44, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 64, 'pad_token_id': 0,
}  # fmt: skip
ROBERTA = {**BERT, 'pad_token_id': 1, 'type_vocab_size': 1}
DISTILBERT = {
    'vocab_size': TOKENS, 'dim': 32, 'hidden_dim': 44, 'n_layers': 2, 'n_heads': 4, 'max_position_embeddings': 64,
}  # fmt: skip
MODERNBERT = {
    'vocab_size': TOKENS, 'hidden_size': 32, 'intermediate_size': 44, 'num_hidden_layers': 4, 'num_attention_heads': 4,
    'max_position_embeddings': 64, 'local_attention': 8, 'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2,
    'cls_token_id': 1, 'sep_token_id': 2,
}  # fmt: skip
NEOX = {
    'vocab_size': TOKENS, 'hidden_size': 32, 'intermediate_size': 44, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'max_position_embeddings': 128, 'rotary_pct': 0.5, 'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2,
}  # fmt: skip
GPT2 = {
    'vocab_size': TOKENS,
    'n_embd': 32,
    'n_layer': 2,
    'n_head': 4,
    'n_positions': 128,
    'bos_token_id': 1,
    'eos_token_id': 2,
}
GPTJ = {**GPT2, 'rotary_dim': 4}
GPT_OSS = {
    'intermediate_size': 48, 'head_dim': 8, 'sliding_window': 5, 'num_local_experts': 4, 'num_experts_per_tok': 2,
    'rope_parameters': {
        'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32, 'rope_theta': 150000.0, 'truncate': False,
    },
}  # fmt: skip
MIXTRAL = {'intermediate_size': 48, 'num_local_experts': 4, 'num_experts_per_tok': 2}
QWEN_MOE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24}
QWEN2_MOE = {**QWEN_MOE, 'shared_expert_intermediate_size': 48}
GRANITE = {
    'embedding_multiplier': 6.0, 'attention_multiplier': 0.2, 'residual_multiplier': 0.4, 'logits_scaling': 2.5,
}  # fmt: skip
OLMO3 = {
    'num_hidden_layers': 4, 'sliding_window': 5,
    'rope_parameters': {
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e3},
        'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e3, 'factor': 4.0, 'original_max_position_embeddings': 16},
    },
}  # fmt: skip
FALCON = {name: size for name, size in DECODER.items() if name not in ('intermediate_size', 'num_key_value_heads')} | {
    'ffn_hidden_size': 44,
}
GEMMA3 = {'head_dim': 12, 'sliding_window': 5, 'query_pre_attn_scalar': 20, 'sliding_window_pattern': 2}
T5 = {
    'vocab_size': TOKENS, 'd_model': 32, 'd_kv': 12, 'd_ff': 44, 'num_layers': 2, 'num_heads': 4, 'decoder_start_token_id': 0,
    'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20,
}  # fmt: skip
WHISPER = {
    'vocab_size': TOKENS, 'd_model': 32, 'encoder_layers': 2, 'encoder_attention_heads': 4, 'encoder_ffn_dim': 44,
    'decoder_layers': 1, 'decoder_attention_heads': 4, 'decoder_ffn_dim': 44, 'num_mel_bins': 8, 'max_source_positions': 20,
    'max_target_positions': 16, 'pad_token_id': 0, 'decoder_start_token_id': 1,
}  # fmt: skip
IMAGES = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'image_size': 16, 'patch_size': 4}
SCALINGS: dict[str, dict[str, Any]] = {
    'linear': {'factor': 4.0},
    'dynamic': {'factor': 4.0},
    'yarn': {'factor': 4.0, 'original_max_position_embeddings': 16},
    'llama3': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16},
    'longrope': {
        'short_factor': [1.0, 1.1, 1.2, 1.3], 'long_factor': [2.0, 3.0, 4.0, 5.0], 'factor': 4.0,
        'original_max_position_embeddings': 128,
    },
}  # fmt: skip

CASES = (
    decoder('Llama', *LLAMA),
    decoder('Llama, one key head, wide heads', *LLAMA, num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-3),
    decoder('Llama, biases, tied', *LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    *(
        decoder(f'Llama, {kind} rotary scaling', *LLAMA, rope_parameters={'rope_type': kind, 'rope_theta': 5e4, **scaling})
        for kind, scaling in SCALINGS.items()
    ),
    decoder('Mistral, window of 5', 'MistralForCausalLM', 'MistralConfig', sliding_window=5, head_dim=16),
    decoder('Mistral, no window', 'MistralForCausalLM', 'MistralConfig', sliding_window=None),
    decoder('Qwen2', 'Qwen2ForCausalLM', 'Qwen2Config'),
    decoder('Qwen2, windows in some layers', 'Qwen2ForCausalLM', 'Qwen2Config', use_sliding_window=True, sliding_window=4,
            max_window_layers=1),
    decoder('Qwen3', 'Qwen3ForCausalLM', 'Qwen3Config', head_dim=12),
    decoder('Qwen3, all heads', 'Qwen3ForCausalLM', 'Qwen3Config', head_dim=8, num_key_value_heads=4, rms_norm_eps=1e-4),
    decoder('Mixtral', 'MixtralForCausalLM', 'MixtralConfig', **MIXTRAL),
    decoder('Mixtral, window of 5, three of six experts', 'MixtralForCausalLM', 'MixtralConfig', intermediate_size=40,
            num_local_experts=6, num_experts_per_tok=3, head_dim=12, sliding_window=5, tie_word_embeddings=True),
    decoder('Qwen2-MoE', 'Qwen2MoeForCausalLM', 'Qwen2MoeConfig', **QWEN2_MOE),
    decoder('Qwen2-MoE, dense layers, windows, no biases', 'Qwen2MoeForCausalLM', 'Qwen2MoeConfig', **QWEN2_MOE,
            mlp_only_layers=[1], norm_topk_prob=True, qkv_bias=False, use_sliding_window=True, sliding_window=4),
    decoder('Qwen3-MoE', 'Qwen3MoeForCausalLM', 'Qwen3MoeConfig', **QWEN_MOE, norm_topk_prob=True),
    decoder('Qwen3-MoE, shares of all experts, dense layers', 'Qwen3MoeForCausalLM', 'Qwen3MoeConfig', **QWEN_MOE,
            head_dim=12, decoder_sparse_step=2, norm_topk_prob=False),
    decoder('Granite', 'GraniteForCausalLM', 'GraniteConfig', **GRANITE),
    decoder('Granite, biases, tied', 'GraniteForCausalLM', 'GraniteConfig', attention_bias=True, mlp_bias=True,
            embedding_multiplier=3.0, attention_multiplier=0.3, tie_word_embeddings=True),
    decoder('SmolLM3', 'SmolLM3ForCausalLM', 'SmolLM3Config', num_hidden_layers=4),
    decoder('SmolLM3, windows, biases, untied', 'SmolLM3ForCausalLM', 'SmolLM3Config', no_rope_layers=[0, 1, 0],
            use_sliding_window=True, sliding_window=5, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    decoder('OLMo 2', 'Olmo2ForCausalLM', 'Olmo2Config'),
    decoder('OLMo 2, all heads, biases, tied', 'Olmo2ForCausalLM', 'Olmo2Config', num_key_value_heads=4, attention_bias=True,
            rms_norm_eps=1e-3, tie_word_embeddings=True),
    decoder('OLMo 3', 'Olmo3ForCausalLM', 'Olmo3Config', **OLMO3),
    decoder('OLMoE', 'OlmoeForCausalLM', 'OlmoeConfig', intermediate_size=48, num_experts=6,
            num_experts_per_tok=4),
    decoder('Phi', 'PhiForCausalLM', 'PhiConfig'),
    decoder('Phi, whole heads, tied', 'PhiForCausalLM', 'PhiConfig', num_key_value_heads=4, tie_word_embeddings=True,
            hidden_act='relu', rope_parameters={'rope_type': 'default', 'rope_theta': 500.0, 'partial_rotary_factor': 1.0}),
    decoder('Phi-3', 'Phi3ForCausalLM', 'Phi3Config'),
    decoder('Phi-3, a part of each head, window of 5', 'Phi3ForCausalLM', 'Phi3Config', sliding_window=5,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
            rope_parameters={'rope_type': 'default', 'rope_theta': 500.0, 'partial_rotary_factor': 0.75}),
    decoder('StarCoder2', 'Starcoder2ForCausalLM', 'Starcoder2Config'),
    decoder('StarCoder2, no biases, untied, window of 5', 'Starcoder2ForCausalLM', 'Starcoder2Config', use_bias=False,
            tie_word_embeddings=False, sliding_window=5),
    neox('GPT-NeoX'),
    neox('GPT-NeoX, whole heads, one after the other', rotary_pct=1.0, use_parallel_residual=False),
    neox('GPT-NeoX, tied, no biases, tanh', rotary_pct=0.75, tie_word_embeddings=True, attention_bias=False,
         hidden_act='gelu_new'),
    Case('GPT-2', lambda: build('GPT2LMHeadModel', 'GPT2Config', GPT2), writes=True),
    Case('GPT-2, untied, ReLU, by layer', lambda: build('GPT2LMHeadModel', 'GPT2Config', GPT2 | {
        'n_layer': 3, 'n_inner': 50, 'tie_word_embeddings': False, 'activation_function': 'relu',
        'scale_attn_by_inverse_layer_idx': True,
    }), writes=True),
    Case('GPT-J', lambda: build('GPTJForCausalLM', 'GPTJConfig', GPTJ), writes=True),
    falcon('Falcon'),
    falcon('Falcon, new, untied', new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    falcon('Falcon, one after the other, biases', multi_query=False, parallel_attn=False, bias=True),
    decoder('Gemma', 'GemmaForCausalLM', 'GemmaConfig', head_dim=12, hidden_act='gelu'),
    decoder('Gemma 2', 'Gemma2ForCausalLM', 'Gemma2Config', head_dim=12, sliding_window=5, query_pre_attn_scalar=20),
    decoder('Gemma 2, low caps', 'Gemma2ForCausalLM', 'Gemma2Config', head_dim=8, sliding_window=4,
            attn_logit_softcapping=2.0, final_logit_softcapping=1.0),
    decoder('Gemma 3', 'Gemma3ForCausalLM', 'Gemma3TextConfig', **GEMMA3, num_hidden_layers=4),
    decoder('Gemma 3, scaled where all is seen', 'Gemma3ForCausalLM', 'Gemma3TextConfig', **GEMMA3,
            layer_types=['sliding_attention', 'full_attention', 'sliding_attention'], rope_parameters={
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e3},
                'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e4},
            }),
    decoder('gpt-oss', 'GptOssForCausalLM', 'GptOssConfig', **GPT_OSS),
    decoder('gpt-oss, two of six experts, low limit', 'GptOssForCausalLM', 'GptOssConfig', **GPT_OSS | {'num_local_experts': 6},
            swiglu_limit=0.5, attention_bias=False, tie_word_embeddings=True, num_hidden_layers=2),
    other('T5 1.0', 'T5ForConditionalGeneration', 'T5Config', **T5),
    other('T5 1.1', 'T5ForConditionalGeneration', 'T5Config', **T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False,
          num_decoder_layers=3),
    other('T5, no head', 'T5Model', 'T5Config', **T5),
    other('T5, encoder', 'T5EncoderModel', 'T5Config', **T5),
    other('BERT, masked words', 'BertForMaskedLM', 'BertConfig', **BERT),
    other('BERT', 'BertModel', 'BertConfig', **BERT, hidden_act='relu', type_vocab_size=3),
    other('RoBERTa, masked words', 'RobertaForMaskedLM', 'RobertaConfig', **ROBERTA),
    other('XLM-RoBERTa', 'XLMRobertaModel', 'XLMRobertaConfig', **ROBERTA | {'type_vocab_size': 2}, hidden_act='quick_gelu'),
    other('DistilBERT, masked words', 'DistilBertForMaskedLM', 'DistilBertConfig', **DISTILBERT),
    other('DistilBERT', 'DistilBertModel', 'DistilBertConfig', **DISTILBERT, activation='relu'),
    other('ModernBERT, masked words', 'ModernBertForMaskedLM', 'ModernBertConfig', **MODERNBERT),
    other('ModernBERT, biases, untied', 'ModernBertForMaskedLM', 'ModernBertConfig', **MODERNBERT | {'local_attention': 6},
          attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True, decoder_bias=False,
          classifier_activation='silu', tie_word_embeddings=False, hidden_activation='silu'),
    other('ModernBERT, scaled', 'ModernBertModel', 'ModernBertConfig', **MODERNBERT, rope_parameters={
        'full_attention': {'rope_type': 'linear', 'factor': 3.0, 'rope_theta': 500.0},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
    }),
    Case('Whisper, encoder', lambda: whisper_encoder(WHISPER)),
    other('ViT', 'ViTModel', 'ViTConfig', **IMAGES, intermediate_size=44, qkv_bias=False),
    other('ViT, classes', 'ViTForImageClassification', 'ViTConfig', **IMAGES, intermediate_size=44),
    other('ViT, not square', 'ViTModel', 'ViTConfig', **IMAGES | {'image_size': (16, 24)}, intermediate_size=44),
    other('DINOv2 with registers', 'Dinov2WithRegistersModel', 'Dinov2WithRegistersConfig', **IMAGES),
    other('DINOv2 with registers, SwiGLU, classes', 'Dinov2WithRegistersForImageClassification', 'Dinov2WithRegistersConfig',
          **IMAGES, use_swiglu_ffn=True),
)  # fmt: skip


def whisper_encoder(keywords: dict[str, Any]) -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(build('WhisperModel', 'WhisperConfig', keywords).config)


def noisy(model: nn.Module) -> Any:
    """With noise on every parameter, so that no bias is zero and no gain is one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model: Any) -> dict[str, Tensor]:
    """What their model takes."""
    torch.manual_seed(2)
    config = model.config
    if config.model_type == 'whisper':
        return {'input_features': torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}
    if getattr(config, 'vocab_size', None) is None:
        sides = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return {'pixel_values': torch.randn(2, config.num_channels, *sides)}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 6 :] = 0
    given = {'input_ids': torch.randint(0, config.vocab_size, (2, LENGTH)), 'attention_mask': mask}
    if 'roberta' in config.model_type:
        # theirs counts no positions where the id of padding stands, which is no word
        given['input_ids'] = given['input_ids'].masked_fill(given['input_ids'] == config.pad_token_id, 3)
    if config.model_type == 't5' and config.is_encoder_decoder:
        given['decoder_input_ids'] = torch.randint(0, config.vocab_size, (2, LENGTH))
        # of the answer all tokens count, of the question those that the mask shows
        given['attention_mask'] = mask
    if hasattr(config, 'type_vocab_size'):
        given['token_type_ids'] = torch.randint(0, config.type_vocab_size, (2, LENGTH))
    return given


def read(output: Any) -> Tensor:
    logits: Tensor = output.logits if 'logits' in output else output.last_hidden_state
    return logits


def ours(model: Any, given: dict[str, Tensor], embeddings: bool) -> Tensor:
    """What our model says to the same."""
    if 'input_features' in given:
        frames: Tensor = model(given['input_features'])
        return frames
    if 'pixel_values' in given:
        out: Tensor = model(given['pixel_values'], return_embeddings=embeddings)
        return out
    if 'decoder_input_ids' in given:
        encoded, mask = model.encode(given['input_ids'], given['attention_mask'].bool())
        asked = {'context': encoded, 'context_mask': mask, 'return_embeddings': embeddings}
        said: Tensor = model.decoder.net(given['decoder_input_ids'], **asked)
        return said
    more = {'token_emb_kwargs': {'token_type_ids': given['token_type_ids']}} if 'token_type_ids' in given else {}
    return model(given['input_ids'], mask=given['attention_mask'].bool(), return_embeddings=embeddings, **more)


def gap(a: Tensor, b: Tensor, given: dict[str, Tensor]) -> float:
    """The largest difference, at tokens."""
    mask = None if 'decoder_input_ids' in given else given.get('attention_mask')
    return float((a - b).abs().max() if mask is None else (a - b).abs()[mask.bool()].max())


@torch.no_grad()
def import_gap(case: Case) -> tuple[Any, Any, float]:
    from x_transformers.hf import from_hf

    theirs = noisy(case.make())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = from_hf(folder)
    given = inputs(theirs)
    output = theirs(**given)
    return theirs, model, gap(read(output), ours(model, given, 'logits' not in output), given)


@torch.no_grad()
def export_gap(theirs: Any, model: Any) -> float:
    """Of their model made of our files."""
    from x_transformers.hf import to_hf

    given = inputs(theirs)
    with tempfile.TemporaryDirectory() as folder:
        to_hf(model, Path(folder) / 'model')
        again = type(theirs).from_pretrained(Path(folder) / 'model').eval()
    return gap(read(theirs(**given)), read(again(**given)), given)


@torch.no_grad()
def cache_gap(theirs: Any, model: Any) -> float:
    """Of our logits token by token from their logits of the whole."""
    ids = inputs(theirs)['input_ids']
    whole, cache, largest = theirs(ids).logits, None, 0.0
    for at in range(ids.shape[1]):
        logits, record = model(ids[:, at : at + 1], cache=cache, return_intermediates=True, input_not_include_cache=True)
        cache = record.kv_cache
        largest = max(largest, float((logits[:, 0] - whole[:, at]).abs().max()))
    return largest


@torch.no_grad()
def left_gap(theirs: Any, model: Any) -> float:
    """Of rows that are padded on the left, whose positions begin behind the padding."""
    ids, start = inputs(theirs)['input_ids'], torch.tensor([0, 6])
    mask = torch.arange(LENGTH) >= start[:, None]
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask.long(), position_ids=places).logits
    return gap(wanted, model(ids, seq_start_pos=start), {'attention_mask': mask})


@torch.no_grad()
def half_gap(theirs: Any) -> tuple[float, float]:
    """How far bfloat16 is from float32 in the middle of all numbers: (in ours, in theirs), both from theirs."""
    from x_transformers.hf import from_hf

    given = inputs(theirs)
    exact, halved = theirs(**given), copy.deepcopy(theirs).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        halved.save_pretrained(folder)
        model = from_hf(folder)
    kinds = {parameter.dtype for parameter in model.parameters()}
    if kinds != {torch.bfloat16}:
        raise AssertionError(f'the file is bfloat16, and the model {kinds}')
    given = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    wanted, mine = read(exact), ours(model, given, 'logits' not in exact)
    theirs_half = read(halved(**given))
    mask = None if 'decoder_input_ids' in given else given.get('attention_mask')
    seen: Any = slice(None) if mask is None else mask.bool()
    return float((mine - wanted)[seen].abs().median()), float((theirs_half - wanted)[seen].abs().median())


@torch.no_grad()
def greedy(theirs: Any, model: Any) -> tuple[bool, int]:
    """(whether both write the same, prompts padded on the left; how often their two best logits lie within the limit)."""
    from x_transformers import AutoregressiveWrapper

    ids, start = inputs(theirs)['input_ids'][:, :9], torch.tensor([0, 3])
    mask = (torch.arange(9) >= start[:, None]).long()
    written = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(written.logits).topk(2, dim=-1).values
    ties = int(((best[..., 0] - best[..., 1]) < LIMIT).sum())
    prompts = [row[begin:] for row, begin in zip(ids, start.tolist(), strict=True)]
    made = AutoregressiveWrapper(model).generate(prompts, STEPS, temperature=0.0)
    return bool((written.sequences[:, 9:] == made).all()), ties
