"""Falcon: attention and feed-forward in parallel, behind one norm or two; one key head or few."""

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
from x_transformers.hf.maps import SAME, apart, chain, paired, regrouped_heads, split_in_groups
from x_transformers.hf.phi import shared_norm_rules


def falcon(config: Config) -> Plain:
    dim, heads, bias = config.need('hidden_size'), config.need('num_attention_heads'), bool(config.get('bias', False))
    config.only('alibi', False, 'this family is read with rotary positions')
    config.only('apply_residual_connection_post_layernorm', False, 'residuals carry what no norm has changed')
    config.values.setdefault('tie_word_embeddings', True)
    new, parallel = is_new(config), config.get('parallel_attn', True)
    # each query head has a key head, or all have one
    usual = 1 if config.get('multi_query', True) else heads
    kv_heads = config.get('num_kv_heads', heads) if new else usual
    if kv_heads < 1 or heads % kv_heads:
        config.wrong.append(f'`num_kv_heads` must divide `num_attention_heads`, {heads}, got {kv_heads}')
    config.skip('num_kv_heads', 'multi_query', 'num_ln_in_parallel_attn')
    stack = layer_normed(
        config, 'Decoder', dim=dim, depth=config.need('num_hidden_layers'), heads=heads,
        inner=config.get('ffn_hidden_size', 4 * dim), act=('activation', 'gelu'), eps=config.get('layer_norm_epsilon', 1e-5),
        **(BIASES if bias else dict.fromkeys(BIASES, False)), ff_no_bias=not bias,
        **({} if kv_heads == heads else {'attn_kv_heads': kv_heads}), **({'parallel_block': True} if new or parallel else {}),
        rotary_pos_emb=True, **rotary(config, dim // heads),
    )  # fmt: skip
    return wrapper(config, stack)


def is_new(config: Config) -> bool:
    """The architecture of 40B and later, whose query heads share a few key heads."""
    return bool(config.get('new_decoder_architecture', False))


def norm_rules(config: Config, model: Plain, layer: str) -> list[KeyRule]:
    if not model['attn_layers'].get('parallel_block'):
        names = ('input_layernorm', 'post_attention_layernorm')
    elif is_new(config) and config.get('num_ln_in_parallel_attn', 2) == 2:
        names = ('ln_attn', 'ln_mlp')
    else:
        return shared_norm_rules(f'{layer}.input_layernorm')
    return [
        entry
        for name, ours in zip(names, (ATTENTION, FORWARD), strict=True)
        for entry in layer_norm_rules(f'{layer}.{name}', f'{ours}.0.0')
    ]


def falcon_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, layer = model['attn_layers'], 'transformer.h.{i}'
    heads, dim_head, bias = int(stack['heads']), int(stack['attn_dim_head']), not stack['ff_no_bias']
    kv_heads = int(stack.get('attn_kv_heads', heads))
    turn, turn_keys = (paired(count, dim_head, stack['rotary_emb_dim']) for count in (heads, kv_heads))
    regrouped = regrouped_heads(heads, kv_heads)
    fused = chain(split_in_groups(kv_heads, heads // kv_heads, dim_head), apart(chain(turn, regrouped), turn_keys, SAME))
    attention = f'{layer}.self_attention'
    rules = [
        rule('transformer.word_embeddings.weight', 'token_emb.emb.weight'),
        *layer_norm_rules('transformer.ln_f', 'attn_layers.final_norm'),
        *norm_rules(config, model, layer),
        *fused_rules(f'{attention}.query_key_value', fused, bias),
        rule(f'{attention}.dense.weight', f'{ATTENTION}.1.to_out.weight', regrouped_heads(heads, kv_heads, dim=1)),
        *([rule(f'{attention}.dense.bias', f'{ATTENTION}.1.to_out.bias')] if bias else []),
        *weight_and_bias(f'{layer}.mlp.dense_h_to_4h', f'{FORWARD}.1.ff.0.0', bias=bias),
        *weight_and_bias(f'{layer}.mlp.dense_4h_to_h', f'{FORWARD}.1.ff.2', bias=bias),
        *logits_rules(model),
    ]
    return for_layers(rules, stack['depth'])


FALCON = Family(('falcon',), falcon, falcon_rules, prefix='transformer.', unused=r'.*rotary_emb\.inv_freq')
