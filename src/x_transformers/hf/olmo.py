"""OLMo 2, OLMo 3 and OLMoE: norms of queries and keys over all heads.

OLMo 2 and 3 have norms behind branches and none in front of them, OLMo 3 windows in some layers, OLMoE mixtures of experts.
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
    head_width,
    layer_kinds,
    pre_norm_rules,
    windows,
)
from x_transformers.hf.mixtral import expert_flags, rules_by_expert


def normed_decoder(config: Config, **more: Any) -> Plain:
    config.values.setdefault('rms_norm_eps', 1e-5)
    return decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **biases(config),
        attn_qk_norm=True,
        attn_qk_norm_dim_scale=True,
        attn_qk_norm_over_heads=True,
        attn_qk_norm_scale=head_width(config) ** -0.5,
        attn_qk_norm_eps=config.get('rms_norm_eps'),
        **more,
    )


def olmo2(config: Config) -> Plain:
    return normed_decoder(config, norm_before=False, sandwich_norm=True)


def olmo3(config: Config) -> Plain:
    depth = config.need('num_hidden_layers')
    usual = ['sliding_attention' if (layer + 1) % 4 else 'full_attention' for layer in range(depth)]
    turned = rotary_by_kind(config, head_width(config), layer_kinds(config, usual), THETAS, scaled=('full_attention',))
    return normed_decoder(config, **windows(config, usual), norm_before=False, sandwich_norm=True, rotary=turned)


# the key of older configs, and the base without
THETAS = dict.fromkeys(('full_attention', 'sliding_attention'), ('rope_theta', 500000.0))


def olmoe(config: Config) -> Plain:
    config.only('clip_qkv', None, 'queries, keys and values are not clipped')
    return normed_decoder(config, **expert_flags(config, 64, 8, normalized=config.get('norm_topk_prob', False)))


def olmo_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, layer = model['attn_layers'], 'model.layers.{i}'
    rules = [
        *ends(model),
        rule(f'{layer}.post_attention_layernorm.weight', f'{ATTENTION}.0.1.g'),
        rule(f'{layer}.post_feedforward_layernorm.weight', f'{FORWARD}.0.1.g'),
        *attention_rules(f'{layer}.self_attn', stack),
        *gated_rules(f'{layer}.mlp', bias=not stack['ff_no_bias']),
    ]
    return for_layers(rules, stack['depth'])


def olmoe_rules(config: Config, model: Plain) -> list[KeyRule]:
    experts = model['attn_layers']['ff_experts']
    return pre_norm_rules(model, rules_by_expert('model.layers.{i}.mlp', experts, 'gate_proj', 'up_proj', 'down_proj'))


OLMO2 = Family(('olmo2',), olmo2, olmo_rules, prefix='model.', unused=UNUSED)
OLMO3 = Family(('olmo3',), olmo3, olmo_rules, prefix='model.', unused=UNUSED)
OLMOE = Family(('olmoe',), olmoe, olmoe_rules, prefix='model.', unused=UNUSED)
