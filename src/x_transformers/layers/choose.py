"""From flags to the modules of one layer: norms, branch, and residual connection."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.feedforward import FeedForward
from x_transformers.flags.base import unknown_flags
from x_transformers.layers.branch import AdaptiveLayerScale, Canon, LayerScale, Scale, ShiftTokens
from x_transformers.layers.gated_streams import GatedMultiResidual
from x_transformers.layers.hyper_connections import HyperConnection
from x_transformers.layers.layer import Layer
from x_transformers.layers.plan import block_numbers
from x_transformers.layers.residual import (
    GRUGating,
    OrthogonalResidual,
    ParallelBlock,
    ResiDual,
    Residual,
    ResidualPath,
    SphereResidual,
)
from x_transformers.layers.split_residual import MVSplitResidual
from x_transformers.mixers.choose import make_mixer
from x_transformers.norms import choose_norm

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.plan import LayerSpec

# the ways to join a branch to the stream, the first that is on
RESIDUALS: tuple[type[ResidualPath], ...] = (
    ResiDual, ParallelBlock, GatedMultiResidual, HyperConnection, GRUGating, OrthogonalResidual, MVSplitResidual,
    SphereResidual, Residual,
)  # fmt: skip
# all of them are told these, as in the original, and some have no use for them
SCALES = ('scale_residual', 'scale_residual_constant')


def make_norm(flags: StackFlags) -> nn.Module:
    return choose_norm(
        flags.norm_kind,
        flags.dim,
        unit_offset=flags.norm_add_unit_offset,
        dim_condition=flags.condition_width,
        init_alpha=flags.dynamic_tanh_init_alpha,
        eps=flags.norm_eps,
        bias=flags.norm_bias,
    )


def choose_branch(flags: StackFlags, spec: LayerSpec, causal: bool) -> nn.Module:
    """What the layer does, inside what scales its output and shifts its input."""
    branch: nn.Module
    block = block_numbers(flags)[spec.index]
    if spec.kind == 'a':
        own = flags.self_attention_flags(first=spec.first).at_depth(block)
        branch = Attention.from_flags(flags.dim, own, shares_keys=spec.keys_from is not None)
    elif spec.kind == 'm':
        branch = make_mixer(flags)
    elif spec.kind == 'c':
        branch = Attention.from_flags(flags.dim, flags.cross_attention.at_depth(block))
    else:
        branch = FeedForward.from_flags(flags.dim, flags.feedforward)
    if spec.half:
        branch = Scale(0.5, branch)
    if spec.shift > 0:
        branch = ShiftTokens(range(0 if causal else -spec.shift, spec.shift + 1), branch)
    if flags.has_canon({'a': 'a', 'f': 'c'}.get(spec.kind, '-')):
        branch = Canon(flags.dim, branch)
    if flags.use_layerscale:
        branch = LayerScale(branch, flags.dim, flags.layerscale_init_value, unit_offset=flags.norm_add_unit_offset)
    elif flags.use_adaptive_layerscale:
        branch = AdaptiveLayerScale(branch, flags.dim, flags.condition_width)
    return branch


def choose_residual(flags: StackFlags, spec: LayerSpec, causal: bool) -> ResidualPath:
    """How the branch is joined to the stream. Raises FlagError for keywords that it does not have, though it takes any."""
    path = next(path for path in RESIDUALS if path.is_on(flags))
    known = {*inspect.signature(path.__init__).parameters, *SCALES} - {'self', 'dim', 'kwargs'}
    if unknown := [name for name in flags.residual_fn_kwargs if name not in known]:
        raise unknown_flags(unknown, where=f'residual_fn_kwargs of {path.__name__}', known=sorted(known))
    residual = path.from_flags(flags, spec)
    residual.is_causal = causal
    return residual


def make_layer(flags: StackFlags, spec: LayerSpec, causal: bool) -> Layer:
    """The modules of one layer. ResiDual brings a norm after each layer of its own accord.

    A prefix decoder is ``causal`` whatever its flag says.
    """
    flags = flags.layer(spec.index)
    before = flags.pre_norm and not (flags.resi_dual or flags.gated_streams or flags.ngpt)
    return Layer(
        before=make_norm(flags) if before and flags.norm_before else None,
        behind=make_norm(flags) if before and flags.sandwich_norm else None,
        after=make_norm(flags) if flags.post_norm else None,
        branch=choose_branch(flags, spec, causal),
        residual=choose_residual(flags, spec, causal),
        scale=flags.branch_scale,
        norm_scale=block_numbers(flags)[spec.index] ** -0.5 if flags.layer_norm_scaling else 1.0,
    )
