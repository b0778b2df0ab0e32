"""Phi-3 and Phi-4: a Llama with one map for queries, keys and values; a part of each head may rotate."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, rotary, rule
from x_transformers.hf.llama import ATTENTION, FORWARD, UNUSED, decoder, pre_norm_rules, windows
from x_transformers.hf.maps import HALVES_SWAPPED, SAME, apart, chain, paired, regrouped_heads, split


def phi3(config: Config) -> Plain:
    dim_head = config.get('head_dim', config.need('hidden_size') // config.need('num_attention_heads'))
    usual = ['sliding_attention'] * config.need('num_hidden_layers')
    turned = rotary(config, dim_head, share=None)
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **windows(config, usual), rotary=turned)


def phi3_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, attention = model['attn_layers'], f'{ATTENTION}.1'
    heads, dim_head = int(stack['heads']), int(stack['attn_dim_head'])
    kv_heads, theirs = int(stack.get('attn_kv_heads', heads)), 'model.layers.{i}.self_attn'
    turn, turn_keys = (paired(count, dim_head, stack['rotary_emb_dim']) for count in (heads, kv_heads))
    fused = split((heads * dim_head, kv_heads * dim_head, kv_heads * dim_head))
    fused = chain(fused, apart(chain(turn, regrouped_heads(heads, kv_heads)), turn_keys, SAME))
    fused_rules = [
        rule(f'{theirs}.qkv_proj.weight', tuple(f'{attention}.to_{name}.weight' for name in 'qkv'), fused),
        rule(f'{theirs}.o_proj.weight', f'{attention}.to_out.weight', regrouped_heads(heads, kv_heads, dim=1)),
    ]
    forward = [
        rule('model.layers.{i}.mlp.gate_up_proj.weight', f'{FORWARD}.1.ff.0.proj.weight', HALVES_SWAPPED),
        rule('model.layers.{i}.mlp.down_proj.weight', f'{FORWARD}.1.ff.2.weight'),
    ]
    return pre_norm_rules(model, forward, fused_rules)


PHI3 = Family(('phi3',), phi3, phi3_rules, prefix='model.', unused=UNUSED)
