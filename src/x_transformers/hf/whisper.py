"""The encoder of Whisper; the decoder of a whole model is omitted."""

from __future__ import annotations

from x_transformers.hf.family import (
    Config,
    Family,
    KeyRule,
    Plain,
    for_layers,
    layer_norm_rules,
    layer_normed,
    rule,
    weight_and_bias,
)
from x_transformers.hf.llama import ATTENTION, FORWARD

# what stands in front of the encoder's names in each architecture
PREFIXES = {'WhisperEncoder': '', 'WhisperModel': 'encoder.', 'WhisperForConditionalGeneration': 'model.encoder.'}
# what is about the decoder, about text or about training
OTHERS = (
    'vocab_size', 'decoder_layers', 'decoder_attention_heads', 'decoder_ffn_dim', 'max_target_positions', 'num_hidden_layers',
    'tie_word_embeddings', 'suppress_tokens', 'begin_suppress_tokens', 'forced_decoder_ids', 'max_length',
    'use_weighted_layer_sum', 'classifier_proj_size', 'median_filter_width', 'apply_spec_augment',
    'alignment_heads', 'lang_ids', 'task_ids',
    *(f'mask_{axis}_{what}' for axis in ('time', 'feature') for what in ('prob', 'length', 'min_masks')),
)  # fmt: skip


def whisper(config: Config) -> Plain:
    dim, heads = config.need('d_model'), config.need('encoder_attention_heads')
    config.only('scale_embedding', False, 'the spectrogram is no table that could be scaled')
    config.skip(*OTHERS)
    if config.architecture and config.architecture not in PREFIXES:
        config.wrong.append(f'`architectures` is {config.architecture}: the encoder is read from {", ".join(PREFIXES)}')
    return {
        'class': 'WhisperEncoder',
        'num_mels': config.get('num_mel_bins', 80),
        'max_seq_len': config.get('max_source_positions', 1500),
        'attn_layers': layer_normed(
            config, 'Encoder', dim=dim, depth=config.need('encoder_layers'), heads=heads, inner=config.need('encoder_ffn_dim'),
            act=('activation_function', 'gelu'), eps=1e-5, attn_qkv_bias=('q', 'v'),
        ),
    }  # fmt: skip


def whisper_rules(config: Config, model: Plain) -> list[KeyRule]:
    prefix = PREFIXES[config.architecture or 'WhisperForConditionalGeneration']
    layer = f'{prefix}layers.{{i}}'
    rules = [
        *weight_and_bias(f'{prefix}conv1', 'conv_in'),
        *weight_and_bias(f'{prefix}conv2', 'conv_down'),
        rule(f'{prefix}embed_positions.weight', 'pos_emb'),
        *(
            entry
            for name in 'qkv'
            for entry in weight_and_bias(f'{layer}.self_attn.{name}_proj', f'{ATTENTION}.1.to_{name}', bias=name != 'k')
        ),
        *weight_and_bias(f'{layer}.self_attn.out_proj', f'{ATTENTION}.1.to_out'),
        *layer_norm_rules(f'{layer}.self_attn_layer_norm', f'{ATTENTION}.0.0'),
        *weight_and_bias(f'{layer}.fc1', f'{FORWARD}.1.ff.0.0'),
        *weight_and_bias(f'{layer}.fc2', f'{FORWARD}.1.ff.2'),
        *layer_norm_rules(f'{layer}.final_layer_norm', f'{FORWARD}.0.0'),
        *layer_norm_rules(f'{prefix}layer_norm', 'attn_layers.final_norm'),
    ]
    return for_layers(rules, model['attn_layers']['depth'])


WHISPER = Family(
    ('whisper',), whisper, whisper_rules, unused=r'(model\.)?decoder\..*|proj_out\.weight', exported_as='WhisperEncoder'
)
