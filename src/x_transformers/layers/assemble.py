"""Construction of a stack's parts that are not layers: streams, positions, connections across layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from x_transformers.flags.stack import StackFlags
from x_transformers.layers.across_depth import AggregatedResiduals, ConcatCombine, DynamicLIMe, MultiwayDense, StreamLambdas
from x_transformers.layers.condition import AdaptiveMLP
from x_transformers.layers.plan import ATTENTIONS, LayerPlan
from x_transformers.layers.residual import BlockStreams, DualStreams, ParallelStreams, SingleStream, UnitStream
from x_transformers.position.grid import GridRotary
from x_transformers.position.polar import PolarEmbedding
from x_transformers.position.rotary import RotaryEmbedding

logger = logging.getLogger('x_transformers')


def choose_rotaries(flags: StackFlags) -> tuple[list[RotaryEmbedding], tuple[int, ...]]:
    """(One embedding for each base and scaling that layers of attention have, which of them each layer has.)"""
    if not flags.rotary:
        return [], ()
    if flags.rotary_axes is not None:
        return grid_rotaries(flags, flags.rotary_axes)
    settings = [(flags.rotary_theta, flags.rotary_scaling)]
    which = []
    for index, kind in enumerate(flags.kinds):
        layer = flags.layer(index)
        own = (layer.rotary_theta, layer.rotary_scaling) if kind in ATTENTIONS else settings[0]
        if own not in settings:
            settings.append(own)
        which.append(settings.index(own))
    return [make_rotary(flags, *own) for own in settings], tuple(which)


def grid_rotaries(flags: StackFlags, axes: tuple[int, ...]) -> tuple[list[RotaryEmbedding], tuple[int, ...]]:
    """The same on a grid: one for each base, or, where the axes are mixed, for each self attention."""
    rotaries: list[RotaryEmbedding] = []
    which, known = [], {}
    for index, kind in enumerate(flags.kinds):
        if kind != 'a':
            which.append(0)
            continue
        layer = flags.layer(index)
        heads = layer.attention.num_kv_heads if flags.rotary_axes_mixed else None
        own = index if flags.rotary_axes_mixed else layer.rotary_theta
        if own not in known:
            known[own] = len(rotaries)
            kwargs: dict[str, Any] = {'base': layer.rotary_theta, 'layout': flags.rotary_layout, 'heads': heads}
            rotaries.append(
                GridRotary(flags.rotary_dim, axes, interpolation_factor=flags.rotary_interpolation_factor, **kwargs)
            )
        which.append(known[own])
    return rotaries, tuple(which)


def make_rotary(flags: StackFlags, theta: float, scaling: Mapping[str, Any] | None) -> RotaryEmbedding:
    if flags.verbose and flags.rotary_dim < 32:
        logger.warning('rotary positions turn only %d channels of each head; 32 or more are advised', flags.rotary_dim)
    return RotaryEmbedding(
        flags.rotary_dim,
        use_xpos=flags.rotary_xpos,
        scale_base=flags.rotary_xpos_scale_base,
        interpolation_factor=flags.rotary_interpolation_factor,
        base_rescale_factor=flags.rotary_base_rescale_factor,
        base=theta,
        centred=not flags.depends_on_places,
        scaling=scaling,
        layout=flags.rotary_layout,
    )


def warn_of_leaks(flags: StackFlags, causal: bool) -> None:
    """Of what is allowed in a causal stack though it is not causal."""
    if flags.verbose and causal and any(cross.inverted_attention for cross in flags.cross_attentions):
        logger.warning('cross_attn_inverted_attention in a causal stack: later tokens take from what earlier ones see')


def choose_polar(flags: StackFlags) -> PolarEmbedding | None:
    if not flags.polar:
        return None
    return PolarEmbedding(flags.attn_dim_head, flags.heads, bias_uniform_init=flags.polar_bias_uniform_init)


def choose_streams(flags: StackFlags) -> SingleStream:
    """What the residual stream is made of."""
    if flags.resi_dual:
        return DualStreams(flags.resi_dual_scale)
    if flags.parallel_block:
        return BlockStreams()
    if flags.ngpt:
        return UnitStream()
    return ParallelStreams(flags.streams) if flags.streams > 1 else SingleStream()


def choose_position_bias(flags: StackFlags) -> nn.Module | None:
    """The bias on self attention's scores that depends on distance."""
    if flags.position_bias is None:
        return None
    from x_transformers.position.relative import AlibiPositionalBias, DynamicPositionBias, RelativePositionBias

    extra = dict(flags.rel_pos_kwargs)
    if flags.alibi_pos_bias:
        return AlibiPositionalBias(**{'heads': flags.alibi_heads, 'total_heads': flags.heads, **extra})
    if flags.rel_pos_bias:
        usual: dict[str, Any] = {
            'scale': flags.attn_dim_head**0.5,
            'causal': flags.causal,
            'heads': flags.heads,
            'num_buckets': flags.rel_pos_num_buckets,
            'max_distance': flags.rel_pos_max_distance,
        }
        return RelativePositionBias(**{**usual, **extra})
    usual = {
        'dim': flags.dim // 4,
        'heads': flags.heads,
        'log_distance': flags.dynamic_pos_bias_log_distance,
        'depth': flags.dynamic_pos_bias_mlp_depth,
        'norm': flags.dynamic_pos_bias_norm,
    }
    return DynamicPositionBias(**{**usual, **extra})


def attributes(flags: StackFlags, plan: LayerPlan) -> dict[str, Any]:
    """What the stack's loop, wrappers, tools and callers read of a stack, by its name there."""
    hands_on = (('a', flags.residual_attn), ('c', flags.cross_residual_attn))
    return {
        'layer_dropouts': [layer.dropout for layer in plan.layers],
        'hands_on_scores': tuple(kind for kind, on in hands_on if on),
        'softclamp_value': flags.softclamp_output_value if flags.softclamp_output else None,
        'depth': plan.depth,
        'attn_heads': flags.heads,
        'attn_dim_head': flags.attn_dim_head,
        'num_attn_layers': plan.count('a'),
        'disable_abs_pos_emb': flags.disables_abs_pos_emb,
        'pre_norm': flags.pre_norm,
        'sandwich_norm': flags.sandwich_norm,
        'cross_attend': flags.cross_attend,
        'residual_attn': flags.residual_attn,
        'cross_residual_attn': flags.cross_residual_attn,
        'need_condition': flags.needs_condition,
        'norm_need_condition': flags.norm_needs_condition,
        'post_branch_fn_needs_condition': flags.branch_needs_condition,
        'dim_condition': flags.condition_dim,
        'num_residual_streams': flags.streams,
        'unet_skips': flags.unet_skips,
        'reinject_input': flags.reinject_input,
        'add_value_residual': flags.add_value_residual,
        'cross_attn_tokens_dropout': flags.cross_attn_tokens_dropout,
    }


def position_parts(flags: StackFlags) -> dict[str, Any]:
    """The positions that all layers share, by their names in the stack."""
    rotaries, of_layer = choose_rotaries(flags)
    polar, bias = choose_polar(flags), choose_position_bias(flags)
    return {
        # the first, and the others where bases or scalings differ between layers
        'rotary_pos_emb': rotaries[0] if rotaries else None,
        'other_rotaries': nn.ModuleList(rotaries[1:]) if len(rotaries) > 1 else None,
        'rotary_of_layer': of_layer,
        'polar_pos_emb': polar,
        'rel_pos': bias,
        'uses_positions': flags.rotary or flags.polar or bias is not None,
        'depends_on_places': flags.depends_on_places,
    }


def depth_parts(flags: StackFlags, plan: LayerPlan) -> dict[str, nn.Module | None]:
    """What reaches over several layers, by its name in the stack."""
    dim = flags.dim
    return {
        'layer_integrators': choose_mixtures(flags, plan),
        'skip_combines': choose_skips(flags, plan),
        'reinject_input_proj': nn.Linear(dim, dim, bias=False) if flags.reinject_input else None,
        'learned_reinject_input_gate': nn.Linear(dim, 1, bias=False) if flags.learned_reinject_input_gate else None,
        'adaptive_mlp': AdaptiveMLP(flags.condition_dim, flags.adaptive_condition_mlp_expansion)
        if flags.needs_condition and flags.adaptive_condition_mlp
        else None,
        'lambdas': choose_lambdas(flags),
        'mudd': choose_dense(flags, plan),
    }


def choose_mixtures(flags: StackFlags, plan: LayerPlan) -> nn.ModuleList | None:
    """What mixes the inputs of all layers so far: one for each step, or for each layer."""
    if flags.aggregates:
        kwargs = {'lora_rank': flags.aggregated_rank, **flags.attn_aggregated_residual_kwargs}
        return nn.ModuleList([AggregatedResiduals(flags.dim, num_views=layer.views, **kwargs) for layer in plan.layers])
    if not flags.integrate_layers:
        return None
    softmax = flags.layer_integrate_use_softmax
    views = [plan.mixed_views(index) for index in range(len(plan.order))]
    return nn.ModuleList(
        [DynamicLIMe(flags.dim, index + 1, num_views=own, use_softmax=softmax) for index, own in enumerate(views)]
    )


def choose_skips(flags: StackFlags, plan: LayerPlan) -> nn.ModuleList:
    skips = nn.ModuleList()
    for layer in plan.layers:
        source = layer.skip_from
        skips.add_module(str(layer.index), None if source is None else ConcatCombine(flags.dim, source))
    return skips


def choose_lambdas(flags: StackFlags) -> StreamLambdas | None:
    residual, embed = flags.starts('residual_lambdas', 1.0), flags.starts('embed_lambdas', 0.0)
    return None if residual is None and embed is None else StreamLambdas(residual, embed)


def choose_dense(flags: StackFlags, plan: LayerPlan) -> nn.ModuleList | None:
    """The mixtures between blocks, and the one behind the last of them."""
    if not flags.mudd:
        return None
    blocks = len(plan.blocks)
    return nn.ModuleList([MultiwayDense(flags.dim, count + 1, 4 if count < blocks else 1) for count in range(1, blocks + 1)])
