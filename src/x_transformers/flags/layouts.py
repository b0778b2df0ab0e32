"""The flags of the kinds of layers in a stack, and of their order.

Derived: ``has_self_attention``, ``has_cross_attention``, ``has_feedforward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.base import flag
from x_transformers.flags.positions import PositionFlags
from x_transformers.flags.reasons import STATE
from x_transformers.flags.rule import Rule

MIXERS = ('gated_delta_rule', 'gated_linear_attention')


@dataclass(frozen=True, kw_only=True, repr=False)
class LayoutFlags(PositionFlags):
    """Flags of ``StackFlags``: the layers and their order."""

    weight_tie_layers: bool = flag(
        False, 'All blocks share one set of weights.', paper='https://arxiv.org/abs/1909.11942', family='layers',
        excludes={('layout', 'layers_execute_order'): 'shared weights repeat the plain block'},
        needs={'depth': 'the number of repetitions is missing'},
    )  # fmt: skip
    custom_layers: tuple[str, ...] | None = flag(
        None, "The layers one by one: 'a' attention, 'c' cross attention, 'f' feed-forward, 'm' mixer.", traits='no_blocks',
        one_of='layout', example=('a', 'f'), family='layers',
    )  # fmt: skip
    layers_execute_order: tuple[int, ...] | None = flag(
        None, 'The order in which the layers run; repeats and gaps are allowed.', traits='no_blocks', example=(1, 0, 2, 3),
        family='layers',
    )  # fmt: skip
    sandwich_coef: int | None = flag(
        None, 'This many attention layers first and feed-forwards last.', paper='https://arxiv.org/abs/1911.03864', low=1,
        traits='no_blocks', one_of='layout', family='layers',
        rules=(
            Rule(
                ('sandwich_coef', 'depth'),
                lambda flags, dim: flags.sandwich_coef is not None and flags.sandwich_coef > (flags.depth or 0),
                'not more attention layers can be moved to the front than there are blocks', {'sandwich_coef': 9},
                'Choose at most {depth}.',
            ),
        ),
    )  # fmt: skip
    par_ratio: int | None = flag(
        None, 'Fewer attention layers: one in this many layers, none in the last third.',
        paper='https://arxiv.org/abs/2009.04534', low=2, traits='no_blocks', one_of='layout', family='layers',
    )  # fmt: skip
    macaron: bool = flag(
        False, 'Half a feed-forward before and half after attention.', paper='https://arxiv.org/abs/1906.02762', family='layers'
    )
    only_attn: bool = flag(
        False, 'No feed-forwards.', paper='https://arxiv.org/abs/2607.18363', since='2.31.10', family='layers',
        excludes={('layers_execute_order', 'unet_skips'): 'this counts on the feed-forwards of each block'},
        idle_with={'macaron': 'there is no feed-forward that could stand on both sides of attention'},
        rules=(
            Rule(
                ('only_attn', 'custom_layers'),
                lambda flags, dim: flags.only_attn and flags.custom_layers is not None and 'f' in flags.custom_layers,
                'the layers are spelt out, with feed-forwards', {'only_attn': True, 'custom_layers': ('a', 'f')},
            ),
        ),
    )  # fmt: skip
    mixer: Callable[..., Any] | str | None = flag(
        None,
        "What layers 'm' of custom_layers are: 'gated_delta_rule', 'gated_linear_attention', or a class or function that makes "
        'of the width a module with forward(x, state) -> (y, state).',
        paper=('https://arxiv.org/abs/2412.06464', 'https://arxiv.org/abs/2312.06635'), since='here', each='mixer',
        traits='row_order', example='gated_delta_rule', family='layers', refused={'context': STATE},
        rules=(
            Rule(
                ('mixer', 'custom_layers'),
                lambda flags, dim: flags.mixer is not None and 'm' not in (flags.custom_layers or ()),
                "no layer is a mixer, 'm'", {'mixer': 'gated_delta_rule'},
                "Spell out the layers, such as ('m', 'f', 'm', 'f', 'a', 'f').",
            ),
            Rule(
                ('custom_layers', 'mixer'), lambda flags, dim: flags.mixer is None and 'm' in (flags.custom_layers or ()),
                "what the layers 'm' are is missing", {'custom_layers': ('m', 'f')}, 'Give [mixer].',
            ),
            Rule(
                ('mixer',), lambda flags, dim: isinstance(flags.mixer, str) and flags.mixer not in MIXERS,
                f'the known names are {", ".join(MIXERS)}', {'mixer': 'mamba', 'custom_layers': ('m', 'f')},
                'Use one of those, or give a class.',
            ),
        ),
    )  # fmt: skip
    mixer_kwargs: Mapping[str, Any] = flag(
        {}, 'Keywords of the mixer, such as heads, dim_head, conv and rank of ours.', parent='mixer', since='here', each='mixer'
    )
    kv_share_every: int | None = flag(
        None, 'This many consecutive self attentions share the keys and values of the first, which alone has a cache.',
        paper='https://arxiv.org/abs/2405.12981', since='here', low=2, traits='across_layers', family='layers',
        excludes={
            ('weight_tie_layers', 'layers_execute_order'): (
                'the first layer of a group makes keys and values for those that follow, each once'
            ),
            'layer_dropout': 'the first layer of a group hands on keys and values to the others, so it cannot be left out',
        },
        rules=(
            Rule(
                ('kv_share_every',), lambda flags, dim: flags.kv_share_every is not None and flags.kinds.count('a') < 2,
                'there are not two self attentions that could share', {'kv_share_every': 2, 'depth': 1}, 'Leave it out.',
                inert=True,
            ),
        ),
        alike=(
            Rule(
                (
                    'kv_share_every', 'heads', 'attn_kv_heads', 'attn_one_kv_head', 'attn_dim_head', 'attn_value_dim_head',
                    'rotary_theta', 'rotary_scaling',
                ),
                lambda flags, dim: (
                    flags.kv_share_every is not None
                    and (
                        flags.differs('num_kv_heads', 'dim_head', 'value_dim')
                        or bool({'rotary_theta', 'rotary_scaling'} & {*flags.varying})
                    )
                ),
                'keys and values of one layer are those of others, so these need the same shape and positions',
                {'kv_share_every': 2, 'attn_value_dim_head': (8, 4)}, only_changed=True,
            ),
        ),
    )  # fmt: skip
    canon: tuple[str, ...] | None = flag(
        None, "Causal convolutions over four tokens, added to their input: before self attention ('a'), of its queries, keys "
        "and values ('b'), before a feed-forward ('c'), inside it ('d'); any of these letters.",
        paper='https://arxiv.org/abs/2512.17351', since='here', traits='row_order', example=('a',), family='layers',
        excludes={'attn_flash_pack_seq': 'a convolution would run from one packed sequence into the next'},
        rules=(
            Rule(
                ('canon',), lambda flags, dim: not set(flags.canon or ()) <= set('abcd'),
                "the places are 'a', 'b', 'c' and 'd'", {'canon': ('a', 'e')}, 'Use some of those.',
            ),
        ),
    )  # fmt: skip
    gradient_checkpointing: bool = flag(
        False, 'In training, branches save only their input and are recomputed in the backward: less memory, more time.',
        paper='https://arxiv.org/abs/1604.06174', since='here', family='layers'
    )  # fmt: skip

    @cached_property
    def has_self_attention(self) -> bool:
        if self.custom_layers is not None:
            return 'a' in self.custom_layers
        return not (self.cross_attend and self.only_cross)

    @cached_property
    def has_cross_attention(self) -> bool:
        return 'c' in self.custom_layers if self.custom_layers is not None else self.cross_attend

    @cached_property
    def has_feedforward(self) -> bool:
        return not self.only_attn and 'f' in (self.custom_layers or 'f')

    def has_canon(self, letter: str) -> bool:
        return letter in (self.canon or ())

    def keywords_of_part(self, part: str, typed: Mapping[str, Any]) -> dict[str, Any]:
        """A part's keywords with those that the stack sets."""
        return dict(typed) | ({'canon': True} if self.has_canon({'attn_': 'b', 'ff_': 'd'}.get(part, '-')) else {})
