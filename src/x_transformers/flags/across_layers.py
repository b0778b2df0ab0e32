"""The flags of connections across layers: factors, streams, mixtures of layers, skips.

Derived: ``streams``, ``gated_streams``; ``mixes_layers``, ``aggregates``, ``aggregated_rank``; ``separate_views``: queries,
keys and values have inputs of their own; ``branch_scale``, the constant factor on what branches write; ``has_final_norm``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.attention import VALUE_RESIDUAL, AttentionFlags
from x_transformers.flags.base import flag
from x_transformers.flags.residuals import ResidualFlags
from x_transformers.flags.rule import Rule

AGGREGATED = ('https://arxiv.org/abs/2603.15031', 'https://arxiv.org/abs/2601.21582')
HYPER = ('https://arxiv.org/abs/2409.19606', 'https://arxiv.org/abs/2512.24880')
LAMBDAS = 'https://github.com/KellerJordan/modded-nanogpt'
LIME = 'https://arxiv.org/abs/2502.09245'
REINJECT = ('https://arxiv.org/abs/1909.01377', 'https://arxiv.org/abs/2410.03020', 'https://arxiv.org/abs/2105.04090')

# reasons that several flags have
SAME_VALUES = "the first layer's values are mixed into those of all layers, so these need the same shape"
TWO_STREAMS = 'there are two streams, of which one only adds up, and no single stream that enters a layer'


@dataclass(frozen=True, kw_only=True, repr=False)
class AcrossFlags(ResidualFlags):
    """Flags of ``StackFlags``: what enters a layer."""

    use_layerscale: bool = flag(
        False, 'LayerScale: learned factors on the branches.', paper='https://arxiv.org/abs/2103.17239',
        formula='x ← x + γ ⊙ f(x)', family='residuals', excludes={'use_adaptive_layerscale': 'a branch is scaled once'},
    )  # fmt: skip
    layerscale_init_value: float = flag(0.0, 'These factors at the start.', parent='use_layerscale', each='layer')
    unet_skips: bool = flag(
        False, 'U-Net skips: later blocks read the inputs of earlier blocks, in reverse order.',
        traits=('across_layers', 'entering'),
        family='residuals', excludes={'weight_tie_layers': 'the second half would be the same layers as the first'},
    )  # fmt: skip
    integrate_layers: bool = flag(
        False, 'Each branch reads a learned mixture of the inputs of all layers so far.', paper=LIME,
        traits=('across_layers', 'no_blocks', 'entering'), family='residuals',
        excludes={'weight_tie_layers': 'the mixture of all layers so far has one weight per layer, and a shared layer is many'},
        rules=(
            Rule(
                ('integrate_layers', 'layers_execute_order'),
                lambda flags, dim: (
                    flags.integrate_layers
                    and flags.layers_execute_order is not None
                    and flags.layers_execute_order != tuple(range(len(flags.layers_execute_order)))
                ),
                'the mixture of all layers so far has one weight per layer, in their order',
                {'integrate_layers': True, 'layers_execute_order': (1, 0, 2, 3)},
            ),
        ),
    )  # fmt: skip
    layer_integrate_use_softmax: bool = flag(
        True, 'The mixture is a softmax; False: ReLU.', paper=LIME, parent='integrate_layers'
    )
    num_residual_streams: int = flag(
        1, 'Hyper connections: number of residual streams.', paper=HYPER, low=1, one_of='residual', traits='entering',
        family='residuals',
    )  # fmt: skip
    hyper_conn_sinkhorn_iters: int = flag(
        5, 'Rounds that make the mixing of the streams doubly stochastic.', paper=HYPER, parent='hyper_conn_doubly_stochastic',
        low=1,
    )  # fmt: skip
    qkv_receive_diff_residuals: bool = flag(
        False, 'Queries, keys and values of self attention are projected from different mixtures.', traits='entering',
        family='residuals',
        rules=(
            Rule(
                ('qkv_receive_diff_residuals',),
                lambda flags, dim: flags.qkv_receive_diff_residuals and flags.streams == 1 and not flags.mixes_layers,
                'there is only one view of the residual to make queries, keys and values of',
                {'qkv_receive_diff_residuals': True},
                'Set [num_residual_streams] above 1, [integrate_layers] or [attn_aggregated_residuals].',
            ),
        ),
    )  # fmt: skip
    reinject_input: bool = flag(False, 'A projection of the input enters every layer.', paper=REINJECT, family='residuals')
    learned_reinject_input_gate: bool = flag(
        False, 'A gate per token on the injected input.', paper=REINJECT, family='residuals'
    )
    add_value_residual: bool = flag(
        False, 'Mix values with those of the first layer.', paper=VALUE_RESIDUAL, family='residuals',
        alike=(
            Rule(
                ('add_value_residual', 'heads', 'attn_kv_heads', 'attn_one_kv_head', 'attn_dim_head', 'attn_value_dim_head'),
                lambda flags, dim: flags.add_value_residual and flags.differs('num_kv_heads', 'value_dim'), SAME_VALUES,
                {'add_value_residual': True, 'attn_value_dim_head': (8, 4)}, only_changed=True,
            ),
            Rule(
                (
                    'add_value_residual', 'heads', 'cross_attn_kv_heads', 'cross_attn_one_kv_head',
                    'cross_attn_dim_head',
                                'cross_attn_value_dim_head',
                ),
                lambda flags, dim: flags.add_value_residual and flags.cross_differs('num_kv_heads', 'value_dim'), SAME_VALUES,
                {'cross_attend': True, 'add_value_residual': True, 'cross_attn_value_dim_head': (8, 4)}, only_changed=True,
            ),
        ),
    )  # fmt: skip
    learned_value_residual_mix: bool = flag(
        True, 'The mixing weight is learned per token and head.', paper=VALUE_RESIDUAL, parent='add_value_residual'
    )
    verbose: bool = flag(True, 'Warn about doubtful settings.', family='layers')
    attn_aggregated_residuals: bool = flag(
        False, 'Attention residuals: each branch reads a mixture of the inputs of all layers so far, weighted by attention.',
        paper=AGGREGATED, since='2.17.0', traits=('across_layers', 'entering'), family='residuals',
        idle_with={'integrate_layers': 'either would mix the inputs of all layers so far, and the second does'},
    )  # fmt: skip
    attn_aggregated_residual_kwargs: Mapping[str, Any] = flag(
        {}, 'Of the queries of that attention: lora_rank (64), lora_activation.', paper=AGGREGATED,
        parent='attn_aggregated_residuals', since='2.17.0',
        rules=(
            Rule(
                ('attn_aggregated_residual_kwargs', 'dim'),
                lambda flags, dim: flags.aggregates and not 0 < flags.aggregated_rank < dim,
                'the rank ({aggregated_rank}) must be at least 1 and less than the width',
                {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 999}},
                'Give a lora_rank below {dim}.',
            ),
            Rule(
                ('attn_aggregated_residual_kwargs',),
                lambda flags, dim: bool(set(flags.attn_aggregated_residual_kwargs) - {'lora_rank', 'lora_activation'}),
                'the known keywords are lora_rank and lora_activation',
                {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 2, 'rank': 3}},
                'Use those.',
            ),
        ),
    )  # fmt: skip
    gated_multi_residual: bool = flag(
        False, 'Streams are read and written through low-rank gates per channel; residual_fn_kwargs needs read_gate_rank.',
        paper='https://qwen.ai/blog?id=qwen3.8-flash-next', parent='num_residual_streams', since='2.31.10',
        rules=(
            Rule(
                ('gated_multi_residual', 'num_residual_streams', 'residual_fn_kwargs'),
                lambda flags, dim: flags.gated_streams and not flags.residual_fn_kwargs.get('read_gate_rank', 0) > 0,
                'the rank of the gates is missing', {'gated_multi_residual': True, 'num_residual_streams': 2},
                'Give read_gate_rank in [residual_fn_kwargs].',
            ),
            Rule(
                ('gated_multi_residual', 'sandwich_norm', 'pre_and_post_norm', 'pre_norm', 'hyper_conn_doubly_stochastic'),
                lambda flags, dim: (
                    flags.gated_streams
                    and (
                        flags.sandwich_norm
                        or flags.pre_and_post_norm
                        or not flags.pre_norm
                        or flags.hyper_conn_doubly_stochastic
                    )
                ),
                'the gates norm what they read, and the streams are not mixed', {
                    'gated_multi_residual': True, 'num_residual_streams': 2, 'residual_fn_kwargs': {'read_gate_rank': 2},
                    'sandwich_norm': True,
                }, only_changed=True,
            ),
        ),
    )  # fmt: skip
    mudd: bool = flag(
        False, 'Between blocks, four mixtures of what entered and left all blocks so far, with weights made of each token: for '
        'queries, keys, values and the stream; one mixture at the end.', paper='https://arxiv.org/abs/2502.12170', since='here',
        traits=('across_layers', 'no_blocks'), family='residuals',
        excludes={
            ('layout', 'layers_execute_order', 'weight_tie_layers', 'macaron', 'only_cross'): (
                'its mixtures stand between blocks that begin with self attention, each once'
            ),
            'entering': 'each decides what enters a layer',
        },
    )  # fmt: skip
    residual_lambdas: bool | float = flag(
        False, 'Before each layer, attention or feed-forward, the stream is multiplied by a learned number of that layer, '
        'which starts at 1; a number: it starts there.', paper=LAMBDAS, since='here', each='layer',
        traits=('across_layers', 'entering'), family='residuals', excludes={('resi_dual', 'parallel_block'): TWO_STREAMS},
    )  # fmt: skip
    embed_lambdas: bool | float = flag(
        False, "Before each layer the stack's input, RMS-normed, is added times a learned number of that layer, "
        'which starts at 0; a number: it starts there.', paper=LAMBDAS, since='here', each='layer',
        traits=('across_layers', 'entering'), family='residuals', excludes={('resi_dual', 'parallel_block'): TWO_STREAMS},
    )  # fmt: skip
    hyper_conn_doubly_stochastic: bool = flag(
        False, 'A doubly stochastic matrix mixes the streams; False: each stream holds their sum.', paper=HYPER,
        parent='num_residual_streams', since='here',
    )  # fmt: skip

    @cached_property
    def streams(self) -> int:
        return self.num_residual_streams

    @property
    def gated_streams(self) -> bool:
        return self.gated_multi_residual and self.num_residual_streams > 1

    @property
    def mixes_layers(self) -> bool:
        """Branches see mixtures of what entered all layers so far."""
        return self.integrate_layers or self.attn_aggregated_residuals

    @property
    def aggregates(self) -> bool:
        """They are attention residuals."""
        return self.attn_aggregated_residuals and not self.integrate_layers

    @property
    def aggregated_rank(self) -> int:
        return int(self.attn_aggregated_residual_kwargs.get('lora_rank', 64))

    @cached_property
    def separate_views(self) -> bool:
        return self.qkv_receive_diff_residuals or self.integrate_layers or self.mudd

    @property
    def branch_scale(self) -> float:
        """The constant factor on what branches write."""
        return self.constant_scale(by_depth=not self.attn_aggregated_residuals)

    @property
    def has_final_norm(self) -> bool:
        return self.gated_streams or self.ends_in_norm

    def starts(self, name: str, usual: float) -> tuple[float, ...] | None:
        """Where a learned number of each layer starts; None if no layer has it."""
        values = [getattr(self.layer(index), name) for index in range(len(self.kinds))]
        if all(value is False for value in values):
            return None
        return tuple(usual if isinstance(value, bool) else float(value) for value in values)

    @property
    def scales_by_depth(self) -> bool:
        """Output projections start smaller the deeper they are."""
        return self.depth_scale_residual is True and not self.attn_aggregated_residuals

    @property
    def attention_keywords(self) -> dict[str, Any]:
        """What the stack sets on self attention."""
        return {
            'heads': self.heads,
            'causal': self.causal,
            'qkv_receive_diff_residuals': self.separate_views,
            'learned_value_residual_mix': self.add_value_residual and self.learned_value_residual_mix,
            'rotate_num_heads': self.rotate_num_heads,
        }

    def self_attention_flags(self, *, first: bool) -> AttentionFlags:
        """Flags of the first self-attention module (no values to mix with, no past layers to mix), or of a later one."""
        if not first:
            return self.attention
        views = self.separate_views and not (self.integrate_layers or self.mudd)
        return dataclasses.replace(self.attention, learned_value_residual_mix=False, qkv_receive_diff_residuals=views)
