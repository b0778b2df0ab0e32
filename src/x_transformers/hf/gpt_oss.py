"""gpt-oss: a mixture of experts, attention sinks, windows in every other layer, YaRN."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.hf.family import Config, Family, KeyRule, Plain, rotary, rule
from x_transformers.hf.llama import FORWARD, UNUSED, biases, decoder, head_width, pre_norm_rules, windows
from x_transformers.hf.maps import Map, each, together
from x_transformers.hf.mixtral import expert_flags
from x_transformers.tensor_types import Float


def gpt_oss(config: Config) -> Plain:
    depth = config.need('num_hidden_layers')
    config.only('hidden_act', 'silu', 'experts have a sigmoid unit of their own')
    config.only('swiglu_alpha', 1.702, 'this unit has the slope of quick_gelu only')
    config.skip('initial_context_length', 'experts_per_token')
    config.values.setdefault('attention_bias', True)
    turned = rotary(config, head_width(config))
    if config.get('rope_theta') is None and config.get('rope_parameters', {}).get('rope_theta') is None:
        turned['rotary_theta'] = 150000.0
    return decoder(
        config,
        **biases(config),
        **windows(config, ['full_attention' if layer % 2 else 'sliding_attention' for layer in range(depth)]),
        rotary=turned,
        attn_head_learned_sink=True,
        ff_no_bias=False,
        ff_glu_bias=True,
        ff_custom_activation='quick_gelu',
        ff_glu_clamp_value=config.get('swiglu_limit', 7.0),
        ff_glu_add_one=True,
        **expert_flags(config, 128, 4),
        ff_router_bias=True,
    )


def neighbours_apart(t: Float[Tensor, 'e i ...']) -> Float[Tensor, 'e i ...']:
    """Gates and values of an expert lie in turn in theirs, values before gates in ours."""
    return together((t[:, 1::2], t[:, ::2]), dim=1)


def neighbours(t: Float[Tensor, 'e i ...']) -> Float[Tensor, 'e i ...']:
    values, gates = t.chunk(2, dim=1)
    return torch.stack((gates, values), dim=2).flatten(1, 2)


# each expert alone
GATES = each(neighbours_apart, neighbours, 'stay')
TURNED = each(lambda t: t.transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2).contiguous(), 'stay')


def expert_rules(theirs: str, ours: str) -> list[KeyRule]:
    maps: dict[str, tuple[str, Map]] = {
        'experts.gate_up_proj': ('first.weight', TURNED.then(GATES)),
        'experts.gate_up_proj_bias': ('first.bias', GATES),
        'experts.down_proj': ('last.weight', TURNED),
    }
    plain = {'router.weight': 'router.weight', 'router.bias': 'router.bias', 'experts.down_proj_bias': 'last.bias'}
    return [
        *(rule(f'{theirs}.{name}', f'{ours}.{to}') for name, to in plain.items()),
        *(rule(f'{theirs}.{name}', f'{ours}.{to}', map) for name, (to, map) in maps.items()),
    ]


def gpt_oss_rules(config: Config, model: Plain) -> list[KeyRule]:
    return pre_norm_rules(model, expert_rules('model.layers.{i}.mlp', f'{FORWARD}.1.ff'))


GPT_OSS = Family(('gpt_oss',), gpt_oss, gpt_oss_rules, prefix='model.', unused=UNUSED)
