"""Mixtral and Qwen3-MoE: a Llama and a Qwen3 whose feed-forwards are mixtures of experts."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, one_or_each, rule
from x_transformers.hf.llama import (
    FORWARD,
    UNUSED,
    biases,
    decoder,
    gated_rules,
    head_norms,
    pre_norm_rules,
    windows,
)
from x_transformers.hf.maps import below


def experts_of(config: Config, usual: int) -> int:
    """How many experts a layer has, which the classes call by either name."""
    return int(config.get('num_experts', config.get('num_local_experts', usual)))


def expert_flags(config: Config, usual: int, active: int, *, normalized: bool = True) -> Plain:
    """The keywords of a mixture of experts.

    ``usual``: how many experts there are, and ``active``: how many of them a token goes through, where a config does not say;
    ``normalized``: the shares of these add up to one.
    """
    count, chosen = experts_of(config, usual), config.get('num_experts_per_tok', active)
    if not 1 <= chosen <= count or count < 2:
        config.wrong.append(
            f'`num_experts` or `num_local_experts` must be 2 or more, and `num_experts_per_tok` at most that, '
            f'got {count} and {chosen}'
        )
    if chosen == 1 and normalized:
        config.wrong.append(
            '`num_experts_per_tok` is 1: shares that add up to one need two experts, or the router learns nothing'
        )
    unnormalized = {} if normalized else {'ff_router_normalize': False}
    return {'ff_experts': count, 'ff_experts_active': chosen, **unnormalized, 'ff_router_balance': 'none'}


def mixtral(config: Config) -> Plain:
    config.skip('router_jitter_noise')
    config.values.setdefault('rms_norm_eps', 1e-5)
    config.values.setdefault('rope_theta', 1e6)
    usual = ['sliding_attention'] * config.need('num_hidden_layers')
    mixed = expert_flags(config, 8, 2)
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **windows(config, usual), **mixed)


def mixed_layers(config: Config) -> list[int]:
    """The layers with experts."""
    config.values.setdefault('decoder_sparse_step', 1)
    dense, step = config.get('mlp_only_layers', []), config.need('decoder_sparse_step')
    return [layer for layer in range(config.need('num_hidden_layers')) if layer not in dense and (layer + 1) % step == 0]


def qwen3_moe(config: Config) -> Plain:
    depth, mixed = config.need('num_hidden_layers'), mixed_layers(config)
    config.skip('max_window_layers', 'sliding_window')
    window = windows(config, ['sliding_attention'] * depth) if config.get('use_sliding_window', False) else {}
    dim_head = config.get('head_dim', config.need('hidden_size') // config.need('num_attention_heads'))
    experts = expert_flags(config, 128, 8, normalized=config.get('norm_topk_prob', False))
    widths = config.get('moe_intermediate_size', 768), config.need('intermediate_size')
    inner = one_or_each([widths[0] if layer in mixed else widths[1] for layer in range(depth)])
    experts['ff_experts'] = one_or_each([experts['ff_experts'] if layer in mixed else None for layer in range(depth)])
    return decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **window,
        **biases(config),
        **head_norms(config, dim_head**-0.5),
        **experts,
        ff_dim_inner=inner,
    )


# ---------------------------------------------------------------- weights


def rules_by_expert(theirs: str, experts: int, gate: str, up: str, down: str) -> list[KeyRule]:
    """Of a router and experts that are modules of their own."""
    each = [f'{theirs}.experts.{number}' for number in range(experts)]
    both = tuple(f'{its}.{name}.weight' for its in each for name in (up, gate))
    return [
        rule(f'{theirs}.gate.weight', f'{FORWARD}.1.ff.router.weight'),
        rule(both, f'{FORWARD}.1.ff.first.weight', below(2, experts)),
        rule(tuple(f'{its}.{down}.weight' for its in each), f'{FORWARD}.1.ff.last.weight', below(1, experts)),
    ]


def mixtral_rules(config: Config, model: Plain) -> list[KeyRule]:
    theirs, experts = 'model.layers.{i}.block_sparse_moe', model['attn_layers']['ff_experts']
    return pre_norm_rules(model, rules_by_expert(theirs, experts, 'w1', 'w3', 'w2'))


def qwen_moe_rules(config: Config, model: Plain) -> list[KeyRule]:
    theirs, mixed, depth = 'model.layers.{i}.mlp', mixed_layers(config), model['attn_layers']['depth']
    experts = rules_by_expert(theirs, experts_of(config, 128), 'gate_proj', 'up_proj', 'down_proj')
    dense = gated_rules(theirs, bias=False)
    by_layer = [entry.at(layer) for layer in range(depth) for entry in (experts if layer in mixed else dense)]
    return [*pre_norm_rules(model, []), *by_layer]


MIXTRAL = Family(('mixtral',), mixtral, mixtral_rules, prefix='model.', unused=UNUSED)
QWEN3_MOE = Family(('qwen3_moe',), qwen3_moe, qwen_moe_rules, prefix='model.', unused=UNUSED)
