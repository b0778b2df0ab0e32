"""Gemma, Gemma 2 and 3: a Llama with scaled embeddings, whose gains are stored as differences from 1.

Gemma 2 and 3 have norms on both sides of a branch, and windows in some layers. Gemma 2 has soft caps on scores and logits,
Gemma 3 norms of heads, and rotary bases of its own in layers with windows.
"""

from __future__ import annotations

from typing import Any

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, for_layers, rotary_by_kind, rule
from x_transformers.hf.llama import (
    ATTENTION,
    FORWARD,
    UNUSED,
    attention_rules,
    biases,
    decoder,
    ends,
    gated_rules,
    head_norms,
    layer_kinds,
    llama_rules,
    windows,
)


def gemma1(config: Config) -> Plain:
    config.only('use_bidirectional_attention', False, 'this family is read from left to right')
    config.only('hidden_activation', 'gelu_pytorch_tanh', 'the activation of this family is that of `hidden_act`')
    # the first configs call it so
    if config.get('hidden_act', '') == 'gelu':
        config.values['hidden_act'] = 'gelu_pytorch_tanh'
    config.values.setdefault('head_dim', 256)
    config.values.setdefault('tie_word_embeddings', True)
    act = activation(config, 'hidden_act', 'gelu_pytorch_tanh')
    model = decoder(config, **act, **biases(config), norm_add_unit_offset=True)
    return {**model, 'embed_scale': config.need('hidden_size') ** 0.5}


def gemma2(config: Config) -> Plain:
    depth = config.need('num_hidden_layers')
    usual = ['full_attention' if layer % 2 else 'sliding_attention' for layer in range(depth)]
    return gemma(config, usual, attn_scale=config.get('query_pre_attn_scalar', 256) ** -0.5)


def gemma3(config: Config) -> Plain:
    depth, period = config.need('num_hidden_layers'), config.get('sliding_window_pattern', 6)
    usual = ['sliding_attention' if (layer + 1) % period else 'full_attention' for layer in range(depth)]
    norms = head_norms(config, config.get('query_pre_attn_scalar', 256) ** -0.5)
    config.only('attn_logit_softcapping', None, 'scores have no cap in this family')
    kinds = layer_kinds(config, usual)
    turned = rotary_by_kind(config, config.get('head_dim', 256), kinds, THETAS, scaled=('full_attention',))
    return gemma(config, usual, **norms, rotary=turned)


# keys of older configs, and what they are without
THETAS = {'full_attention': ('rope_theta', 1e6), 'sliding_attention': ('rope_local_base_freq', 1e4)}


def gemma(config: Config, usual: list[str], **more: Any) -> Plain:
    """``usual``: the kinds of layers, unless the config has its own."""
    dim = config.need('hidden_size')
    config.only('use_bidirectional_attention', False, 'this family is read from left to right')
    config.skip('query_pre_attn_scalar', 'sliding_window_pattern', '_sliding_window_pattern', 'cache_implementation')
    cap, last = config.get('attn_logit_softcapping'), config.get('final_logit_softcapping')
    caps = {} if cap is None else {'attn_softclamp_logits': True, 'attn_logit_softclamp_value': cap}
    model = decoder(
        config,
        **activation(config, 'hidden_activation', config.get('hidden_act', 'gelu_pytorch_tanh')),
        **windows(config, usual),
        **biases(config),
        **caps,
        **more,
        norm_add_unit_offset=True,
        sandwich_norm=True,
    )
    # ties are what this family has unless its config says otherwise
    if config.get('tie_word_embeddings', True) and 'return_only_embed' not in model:
        model['tie_embedding'] = True
    head = {'embed_scale': dim**0.5}
    if last is not None and 'return_only_embed' not in model:
        head['logits_softcap'] = last
    return {**model, **head}


def gemma_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, layer = model['attn_layers'], 'model.layers.{i}'
    norms = {
        'input_layernorm': f'{ATTENTION}.0.0',
        'post_attention_layernorm': f'{ATTENTION}.0.1',
        'pre_feedforward_layernorm': f'{FORWARD}.0.0',
        'post_feedforward_layernorm': f'{FORWARD}.0.1',
    }
    rules = [
        *ends(model),
        *(rule(f'{layer}.{name}.weight', f'{ours}.g') for name, ours in norms.items()),
        *attention_rules(f'{layer}.self_attn', stack, unit_offset=True),
        *gated_rules(f'{layer}.mlp', not stack['ff_no_bias']),
    ]
    return for_layers(rules, stack['depth'])


GEMMA = Family(('gemma',), gemma1, llama_rules, prefix='model.', unused=UNUSED)
GEMMA2 = Family(('gemma2',), gemma2, gemma_rules, prefix='model.', unused=UNUSED)
GEMMA3 = Family(('gemma3_text',), gemma3, gemma_rules, prefix='model.', unused=UNUSED)
