"""StarCoder2: layer norms, rotary positions, few key heads, a plain feed-forward, biases."""

from __future__ import annotations

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
from x_transformers.hf.llama import (
    ATTENTION,
    FORWARD,
    UNUSED,
    attention_rules,
    head_width,
    kv_heads_of,
    logits_rules,
    windows,
    wrapper,
)


def starcoder2(config: Config) -> Plain:
    dim, heads, depth = config.need('hidden_size'), config.need('num_attention_heads'), config.need('num_hidden_layers')
    dim_head, bias = head_width(config), bool(config.get('use_bias', True))
    config.values.setdefault('tie_word_embeddings', True)
    stack = layer_normed(
        config, 'Decoder', dim=dim, depth=depth, heads=heads, inner=config.need('intermediate_size'),
        act=('hidden_act', 'gelu_pytorch_tanh'), eps=config.get('norm_epsilon', 1e-5),
        attn_dim_head=dim_head, attn_qkv_bias=bias, attn_out_bias=bias, ff_no_bias=not bias, **kv_heads_of(config),
        **windows(config), rotary_pos_emb=True, **rotary(config, dim_head),
    )  # fmt: skip
    return wrapper(config, stack)


def starcoder2_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, layer = model['attn_layers'], 'model.layers.{i}'
    bias = not stack['ff_no_bias']
    rules = [
        rule('model.embed_tokens.weight', 'token_emb.emb.weight'),
        *layer_norm_rules(f'{layer}.input_layernorm', f'{ATTENTION}.0.0'),
        *layer_norm_rules(f'{layer}.post_attention_layernorm', f'{FORWARD}.0.0'),
        *layer_norm_rules('model.norm', 'attn_layers.final_norm'),
        *attention_rules(f'{layer}.self_attn', stack),
        *weight_and_bias(f'{layer}.mlp.c_fc', f'{FORWARD}.1.ff.0.0', bias=bias),
        *weight_and_bias(f'{layer}.mlp.c_proj', f'{FORWARD}.1.ff.2', bias=bias),
        *logits_rules(model),
    ]
    return for_layers(rules, stack['depth'])


STARCODER2 = Family(('starcoder2',), starcoder2, starcoder2_rules, prefix='model.', unused=UNUSED)
