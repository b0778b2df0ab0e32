"""Phi-3 and Phi-4: a Llama with one map for queries, keys and values; a part of each head may rotate."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, rotary, rule
from x_transformers.hf.llama import ATTENTION, FORWARD, UNUSED, decoder, fused_rules, head_width, pre_norm_rules, windows
from x_transformers.hf.maps import HALVES_SWAPPED, SAME, apart, chain, paired, regrouped_heads, split


def phi3(config: Config) -> Plain:
    turned = rotary(config, head_width(config), share=None)
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **windows(config), rotary=turned)


def phi3_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack = model['attn_layers']
    heads, dim_head = int(stack['heads']), int(stack['attn_dim_head'])
    kv_heads, theirs = int(stack.get('attn_kv_heads', heads)), 'model.layers.{i}.self_attn'
    turn, turn_keys = (paired(count, dim_head, stack['rotary_emb_dim']) for count in (heads, kv_heads))
    fused = split((heads * dim_head, kv_heads * dim_head, kv_heads * dim_head))
    fused = chain(fused, apart(chain(turn, regrouped_heads(heads, kv_heads)), turn_keys, SAME))
    attention = [
        *fused_rules(f'{theirs}.qkv_proj', fused, bias=False),
        rule(f'{theirs}.o_proj.weight', f'{ATTENTION}.1.to_out.weight', regrouped_heads(heads, kv_heads, dim=1)),
    ]
    forward = [
        rule('model.layers.{i}.mlp.gate_up_proj.weight', f'{FORWARD}.1.ff.0.proj.weight', HALVES_SWAPPED),
        rule('model.layers.{i}.mlp.down_proj.weight', f'{FORWARD}.1.ff.2.weight'),
    ]
    return pre_norm_rules(model, forward, attention)


PHI3 = Family(('phi3',), phi3, phi3_rules, prefix='model.', unused=UNUSED)
