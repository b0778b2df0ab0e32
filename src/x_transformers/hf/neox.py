"""GPT-NeoX and Pythia: attention and feed-forward in parallel, rotary positions in a part of each head."""

from __future__ import annotations

from x_transformers.hf.family import (
    BIASES,
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
from x_transformers.hf.llama import ATTENTION, FORWARD, fused_rules, logits_rules, wrapper
from x_transformers.hf.maps import SAME, apart, chain, paired, split_in_groups


def neox(config: Config) -> Plain:
    dim, heads = config.need('hidden_size'), config.need('num_attention_heads')
    config.only('is_decoder', False, 'this family is read as a decoder', True)
    # older configs have names of their own
    old = 'rope_parameters' not in config.values
    turned = rotary(config, dim // heads, share=config.get('rotary_pct', 0.25) if old else None)
    if old:
        turned['rotary_theta'] = float(config.get('rotary_emb_base', turned['rotary_theta']))
    config.skip('rotary_pct', 'rotary_emb_base')
    stack = layer_normed(
        config, 'Decoder', dim=dim, depth=config.need('num_hidden_layers'), heads=heads,
        inner=config.need('intermediate_size'), act=('hidden_act', 'gelu'), eps=config.get('layer_norm_eps', 1e-5),
        **(BIASES if config.get('attention_bias', True) else dict.fromkeys(BIASES, False)),
        **({'parallel_block': True} if config.get('use_parallel_residual', True) else {}),
        rotary_pos_emb=True, **turned,
    )  # fmt: skip
    return wrapper(config, stack)


def neox_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, theirs = model['attn_layers'], 'gpt_neox.layers.{i}'
    heads, dim_head, bias = int(stack['heads']), int(stack['attn_dim_head']), bool(stack.get('attn_qkv_bias'))
    turn = paired(heads, dim_head, stack['rotary_emb_dim'])
    fused = chain(split_in_groups(heads, 1, dim_head), apart(turn, turn, SAME))
    rules = [
        rule('gpt_neox.embed_in.weight', 'token_emb.emb.weight'),
        *layer_norm_rules(f'{theirs}.input_layernorm', f'{ATTENTION}.0.0'),
        *layer_norm_rules(f'{theirs}.post_attention_layernorm', f'{FORWARD}.0.0'),
        *layer_norm_rules('gpt_neox.final_layer_norm', 'attn_layers.final_norm'),
        *fused_rules(f'{theirs}.attention.query_key_value', fused, bias),
        *weight_and_bias(f'{theirs}.attention.dense', f'{ATTENTION}.1.to_out', bias=bias),
        *weight_and_bias(f'{theirs}.mlp.dense_h_to_4h', f'{FORWARD}.1.ff.0.0'),
        *weight_and_bias(f'{theirs}.mlp.dense_4h_to_h', f'{FORWARD}.1.ff.2'),
        *logits_rules(model, 'embed_out.weight'),
    ]
    return for_layers(rules, stack['depth'])


UNUSED = r'(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias|.*rotary_emb\.inv_freq'
GPT_NEOX = Family(('gpt_neox',), neox, neox_rules, prefix='gpt_neox.', unused=UNUSED)
