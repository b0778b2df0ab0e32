"""Phi and GPT-J: attention and feed-forward in parallel behind one norm, rotary positions in a part of each head.

Here each of the two branches has a copy of this norm. Only models in which the copies are equal are written.
"""

from __future__ import annotations

from typing import Any

from x_transformers.hf.family import (
    Config,
    Family,
    KeyRule,
    Plain,
    for_layers,
    layer_norm_rules,
    layer_normed,
    rotary,
    rule,
    weight_and_bias,
)
from x_transformers.hf.gpt2 import SUMMARY
from x_transformers.hf.llama import ATTENTION, FORWARD, UNUSED, attention_rules, head_width, kv_heads_of, logits_rules, wrapper
from x_transformers.hf.maps import COPIED


def parallel_model(config: Config, *, dim: int, heads: int, **more: Any) -> Plain:
    """``more``: of ``layer_normed``."""
    stack = layer_normed(
        config, 'Decoder', dim=dim, heads=heads, parallel_block=True, rotary_pos_emb=True, **more,
    )  # fmt: skip
    model = wrapper(config, stack)
    return model if 'return_only_embed' in model else {**model, 'logits_bias': True}


def phi(config: Config) -> Plain:
    dim, heads = config.need('hidden_size'), config.need('num_attention_heads')
    config.only('qk_layernorm', False, 'norms of queries and keys have no bias')
    config.values.setdefault('partial_rotary_factor', 0.5)
    dim_head = head_width(config)
    return parallel_model(
        config, dim=dim, depth=config.need('num_hidden_layers'), heads=heads, inner=config.need('intermediate_size'),
        act=('hidden_act', 'gelu_new'), eps=config.get('layer_norm_eps', 1e-5), attn_dim_head=dim_head, **kv_heads_of(config),
        **rotary(config, dim_head, share=None),
    )  # fmt: skip


def gptj(config: Config) -> Plain:
    dim, heads, turned = config.need('n_embd'), config.need('n_head'), config.need('rotary_dim')
    config.skip(*SUMMARY, 'rotary', 'scale_attn_weights')
    if turned % 2 or turned > dim // heads:
        config.wrong.append(f'`rotary_dim` is {turned}: channels turn in pairs, at most the {dim // heads} of a head')
    model = parallel_model(
        config, dim=dim, depth=config.need('n_layer'), heads=heads, inner=config.get('n_inner', 4 * dim),
        act=('activation_function', 'gelu_new'), eps=config.get('layer_norm_epsilon', 1e-5), attn_qkv_bias=False,
        attn_out_bias=False, rotary_emb_dim=turned,
    )  # fmt: skip
    return {**model, 'max_seq_len': config.need('n_positions')}


# ---------------------------------------------------------------- weights


def shared_norm_rules(norm: str) -> list[KeyRule]:
    """Of the norm of a block, of which each branch has a copy."""
    return [
        rule(f'{norm}.{theirs}', (f'{ATTENTION}.0.0.{ours}', f'{FORWARD}.0.0.{ours}'), COPIED)
        for theirs, ours in (('weight', 'gamma'), ('bias', 'beta'))
    ]


def parallel_rules(model: Plain, norm: str, first: str, last: str) -> list[KeyRule]:
    """Of a block's norm, its feed-forward and the head."""
    rules = [
        *shared_norm_rules(norm),
        *weight_and_bias(first, f'{FORWARD}.1.ff.0.0'),
        *weight_and_bias(last, f'{FORWARD}.1.ff.2'),
    ]
    if not model.get('return_only_embed'):
        rules.append(rule('lm_head.bias', 'to_logits.bias'))
    return rules + logits_rules(model)


def phi_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, layer = model['attn_layers'], 'model.layers.{i}'
    rules = [
        rule('model.embed_tokens.weight', 'token_emb.emb.weight'),
        *layer_norm_rules('model.final_layernorm', 'attn_layers.final_norm'),
        *attention_rules(f'{layer}.self_attn', stack, out='dense'),
        *parallel_rules(model, f'{layer}.input_layernorm', f'{layer}.mlp.fc1', f'{layer}.mlp.fc2'),
    ]
    return for_layers(rules, stack['depth'])


def gptj_rules(config: Config, model: Plain) -> list[KeyRule]:
    layer = 'transformer.h.{i}'
    rules = [
        rule('transformer.wte.weight', 'token_emb.emb.weight'),
        *layer_norm_rules('transformer.ln_f', 'attn_layers.final_norm'),
        # neighbouring channels turn together, as here
        *(rule(f'{layer}.attn.{name}_proj.weight', f'{ATTENTION}.1.to_{name}.weight') for name in ('q', 'k', 'v', 'out')),
        *parallel_rules(model, f'{layer}.ln_1', f'{layer}.mlp.fc_in', f'{layer}.mlp.fc_out'),
    ]
    return for_layers(rules, model['attn_layers']['depth'])


PHI = Family(('phi',), phi, phi_rules, prefix='model.', unused=UNUSED)
GPTJ = Family(
    ('gptj',),
    gptj,
    gptj_rules,
    prefix='transformer.',
    unused=r'(transformer\.)?h\.\d+\.attn\.(masked_bias|bias|embed_positions)',
)
