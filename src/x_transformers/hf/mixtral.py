"""Mixtral, Qwen2-MoE and Qwen3-MoE: a Llama, a Qwen2 and a Qwen3 whose feed-forwards are mixtures of experts."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, one_or_each, rule
from x_transformers.hf.llama import (
    FORWARD,
    UNUSED,
    biases,
    decoder,
    gated_rules,
    head_norms,
    head_width,
    pre_norm_rules,
    windows,
    windows_if_used,
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
    mixed = expert_flags(config, 8, 2)
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **windows(config), **mixed)


def mixed_layers(config: Config) -> list[int]:
    """The layers with experts."""
    config.values.setdefault('decoder_sparse_step', 1)
    dense, step = config.get('mlp_only_layers', []), config.need('decoder_sparse_step')
    return [layer for layer in range(config.need('num_hidden_layers')) if layer not in dense and (layer + 1) % step == 0]


def qwen_experts(config: Config, usual: int, active: int, width: int) -> Plain:
    """The keywords of feed-forwards, of which some are mixtures. ``usual`` numbers and ``width`` where a config has none."""
    depth, mixed = config.need('num_hidden_layers'), mixed_layers(config)
    wide, narrow = config.need('intermediate_size'), config.get('moe_intermediate_size', width)
    experts = expert_flags(config, usual, active, normalized=config.get('norm_topk_prob', False))
    if not mixed:
        return {'ff_dim_inner': wide}
    experts['ff_experts'] = one_or_each([experts['ff_experts'] if layer in mixed else None for layer in range(depth)])
    return {**experts, 'ff_dim_inner': one_or_each([narrow if layer in mixed else wide for layer in range(depth)])}


def qwen2_moe(config: Config) -> Plain:
    depth, first = config.need('num_hidden_layers'), config.get('max_window_layers', 28)
    config.skip('sliding_window', 'layer_types')
    usual = ['full_attention' if layer % 2 or layer >= first else 'sliding_attention' for layer in range(depth)]
    experts = qwen_experts(config, 60, 4, 1408)
    width, shared = config.get('moe_intermediate_size', 1408), config.get('shared_expert_intermediate_size', 5632)
    if shared % width or shared < width:
        config.wrong.append(
            f'`shared_expert_intermediate_size` must be a multiple of `moe_intermediate_size`, {width}, got {shared}'
        )
    if 'ff_experts' in experts:
        experts |= {'ff_shared_experts': shared // width, 'ff_shared_experts_gate': True}
    return decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **windows_if_used(config, usual),
        **experts,
        attn_qkv_bias=bool(config.get('qkv_bias', True)),
    )


def qwen3_moe(config: Config) -> Plain:
    config.skip('max_window_layers', 'sliding_window')
    return decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **windows_if_used(config),
        **biases(config),
        **head_norms(config, head_width(config) ** -0.5),
        **qwen_experts(config, 128, 8, 768),
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
    theirs, mixed, stack = 'model.layers.{i}.mlp', mixed_layers(config), model['attn_layers']
    given = stack.get('ff_experts')
    count = max(number or 0 for number in (given if isinstance(given, list) else [given]))
    experts = rules_by_expert(theirs, count, 'gate_proj', 'up_proj', 'down_proj')
    if stack.get('ff_shared_experts'):
        experts += gated_rules(f'{theirs}.shared_expert', bias=False, ours=f'{FORWARD}.1.ff.shared.ff')
        experts.append(rule(f'{theirs}.shared_expert_gate.weight', f'{FORWARD}.1.ff.shared_gate.weight'))
    dense = gated_rules(theirs, bias=False)
    by_layer = [entry.at(layer) for layer in range(stack['depth']) for entry in (experts if layer in mixed else dense)]
    return [*pre_norm_rules(model, []), *by_layer]


MIXTRAL = Family(('mixtral',), mixtral, mixtral_rules, prefix='model.', unused=UNUSED)
QWEN2_MOE = Family(('qwen2_moe',), qwen2_moe, qwen_moe_rules, prefix='model.', unused=UNUSED)
QWEN3_MOE = Family(('qwen3_moe',), qwen3_moe, qwen_moe_rules, prefix='model.', unused=UNUSED)
