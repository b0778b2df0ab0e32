"""Transformations of values before attention, and of the output after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.heads import merge_heads, with_memories
from x_transformers.helpers import log, single, softclamp, without_component
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.attention.parts import AttentionParts, Seen
    from x_transformers.cache.layer_cache import LayerCache

# ---------------------------------------------------------------- value residual


def mix_tokens(attn: AttentionParts, seen: Seen, inputs: BranchInputs) -> Tensor:
    """The tokens that decide how much of their own values is kept: those that the values belong to, as queries are read."""
    if inputs.context is not None:
        if attn.to_latent_q is None or attn.dim_context != attn.dim:
            return inputs.context
        narrow: Tensor = attn.to_latent_q(inputs.context)
        return narrow
    if inputs.mem is None:
        return seen.queries
    mem = inputs.mem if attn.to_latent_q is None else attn.to_latent_q(inputs.mem)
    return with_memories(seen.queries, mem)


def mix_values(
    own: Float[Tensor, 'b kh n e'], first: Float[Tensor, 'b kh m e'], weights: Float[Tensor, 'b n kh'] | None = None
) -> Float[Tensor, 'b kh n e']:
    """Own values mixed with the first layer's: by ``weights``, the part of the own ones, or half and half.

    Where one has more memories in front than the other, the newest rows are mixed. https://arxiv.org/abs/2410.17897
    """
    n, m = own.shape[-2], first.shape[-2]
    if m > n:
        first = first[..., m - n :, :]
    share = 0.5 if weights is None else weights.transpose(1, 2).unsqueeze(-1)
    if m < n:
        share = share if isinstance(share, float) else share[..., n - m :, :]
        newest = own[..., n - m :, :]
        return torch.cat((own[..., : n - m, :], first + share * (newest - first)), dim=-2)
    return first + share * (own - first)


def mixed_values(
    attn: AttentionParts, own: Float[Tensor, 'b kh m e'], seen: Seen, inputs: BranchInputs
) -> Float[Tensor, 'b kh m e']:
    """Values of a layer mixed with the first layer's, if there are any."""
    if inputs.first_values is None:
        return own
    mix = attn.to_value_residual_mix
    return mix_values(own, inputs.first_values, None if mix is None else mix(mix_tokens(attn, seen, inputs)))


def normed_values(attn: AttentionParts, v: Float[Tensor, 'b kh m e']) -> Float[Tensor, 'b kh m e']:
    return v if attn.value_rmsnorm is None else attn.value_rmsnorm(v).to(v.dtype)


# ---------------------------------------------------------------- exclusive attention


def own_values(
    values: Float[Tensor, 'b kh j e'], queries: int, mems: int, past: LayerCache | None
) -> Float[Tensor, 'b kh i e']:
    """The values of the queries' own tokens, as they are attended to. The first ``mems`` are those of memories."""
    if past is None:
        return values[..., values.shape[-2] - queries :, :]
    return past.newest(values[..., mems:, :] if mems else values, 0, queries)


def exclusive(out: Float[Tensor, 'b h i e'], own: Float[Tensor, 'b kh i e']) -> Float[Tensor, 'b h i e']:
    """Each head's output without its component along the own value. https://arxiv.org/abs/2603.09078"""
    return without_component(out, tiled_heads(own, out.shape[1]), torch.promote_types(out.dtype, torch.float32))


def orthogonal_to_values(
    merged: Float[Tensor, 'b n (h e)'], own: Float[Tensor, 'b kh m e'], heads: int, copies: int
) -> Float[Tensor, 'b n c']:
    """Each token's output without its component along the token's own values, once for each of the two flags.

    As in 2.16.1 the flag that is named after heads takes all heads as one vector, too.
    """
    own = tiled_heads(own[..., own.shape[-2] - merged.shape[-2] :, :], heads)
    return torch.cat([without_component(merged, merge_heads(own))] * copies, dim=-1)


# ---------------------------------------------------------------- LASER


def laser_in(v: Float[Tensor, 'b kh j e'], clamp: float) -> Tensor:
    """Attend over exponentials, so that gradients are not scaled by the weights. https://arxiv.org/abs/2411.03493

    They are single precision: the exponential of 12 is too large for a half.
    """
    return softclamp(single(v), clamp).exp()


def laser_out(out: Float[Tensor, 'b h i e'], dtype: torch.dtype) -> Tensor:
    return log(out).to(dtype)
