"""From flags to the parts of a stack that are no layers: streams and positions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from x_transformers.flags.stack import StackFlags
from x_transformers.layers.residual import BlockStreams, DualStreams, ParallelStreams, SingleStream
from x_transformers.position.polar import PolarEmbedding
from x_transformers.position.rotary import RotaryEmbedding

logger = logging.getLogger('x_transformers')


def choose_rotaries(flags: StackFlags) -> tuple[list[RotaryEmbedding], tuple[int, ...]]:
    """(One embedding for each base and scaling that layers of attention have, which of them each layer has.)"""
    if not flags.rotary:
        return [], ()
    settings = [(flags.rotary_theta, flags.rotary_scaling)]
    which = []
    for index, kind in enumerate(flags.kinds):
        layer = flags.layer(index)
        own = (layer.rotary_theta, layer.rotary_scaling) if kind != 'f' else settings[0]
        if own not in settings:
            settings.append(own)
        which.append(settings.index(own))
    return [make_rotary(flags, *own) for own in settings], tuple(which)


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
