"""Multi-head latent attention: keys and values are projected from a narrow latent, which is what the cache stores.

The latent knows no position; ``latent_rope_subheads`` key heads bypass it and are rotated. https://arxiv.org/abs/2405.04434
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from x_transformers.attention.heads import split_heads
from x_transformers.attention.project import KeysValues, append_to_past, held_rows, with_token_values
from x_transformers.attention.qk_norm import normed_keys
from x_transformers.attention.values import mixed_values, normed_values
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.attention.parts import AttentionParts, Seen
    from x_transformers.cache.layer_cache import LayerCache


def latent_keys_values(attn: AttentionParts, seen: Seen, inputs: BranchInputs) -> KeysValues:
    """Keys and values through the latent, in the order memories, past, new."""
    cross = inputs.context is not None
    past = inputs.past
    if cross and held_rows(past, 'latent'):
        held = cast('LayerCache', past)
        return with_rotated_heads(attn, cast(Tensor, held.get('latent')), held.get('k_rope'), held.get('mixed'), None, inputs)
    apart = attn.flags.tensor_product and seen.values is not seen.keys
    z: Tensor = cast(nn.Module, attn.to_latent_kv)(seen.keys, *((seen.values,) if apart else ()))
    new = {'latent': z}
    if attn.to_rotateable_k is not None:
        new['k_rope'] = split_heads(attn.to_rotateable_k(seen.keys), cast(int, attn.rotated_heads))
    own = split_heads(attn.to_v(z), attn.kv_heads)
    if inputs.token_values is not None:
        own = with_token_values(own, seen, inputs.token_values)
    if inputs.first_values is not None or inputs.token_values is not None:
        # each token has its own share of first values, and its row of a table, once
        if past is not None and not cross and held_rows(past, 'mixed') != held_rows(past, 'latent'):
            raise ValueError(
                'cache must hold the mixed values of the past, which a value residual or value_embed needs and a cached_kv '
                'set by hand lacks. Pass the cache of an earlier call.'
            )
        new['mixed'] = normed_values(attn, mixed_values(attn, own, seen, inputs))
    whole = dict(zip(new, append_to_past(past, seen.mems, cross, **new), strict=True))
    mixed = whole.get('mixed')
    if mixed is None and whole['latent'] is z:
        mixed = normed_values(attn, own)
    return with_rotated_heads(attn, whole['latent'], whole.get('k_rope'), mixed, own, inputs)


def with_rotated_heads(
    attn: AttentionParts,
    z: Float[Tensor, 'b j z'],
    k_rope: Float[Tensor, 'b r j d'] | None,
    values: Float[Tensor, 'b kh j e'] | None,
    own: Float[Tensor, 'b kh m e'] | None,
    inputs: BranchInputs,
) -> KeysValues:
    """Key heads from the latent with the rotated heads behind them; values, unless they are known, from the latent too."""
    keys = [] if k_rope is None else [k_rope]
    heads = attn.kv_heads - sum(t.shape[1] for t in keys)
    if heads > 0:
        keys = [split_heads(attn.to_k(z), heads), *keys]
    k = normed_keys(attn, torch.cat(keys, dim=1) if len(keys) > 1 else keys[0])
    if inputs.positions is not None:
        k = inputs.positions.keys(k, attn.rotated_heads)
    if values is None:
        values = normed_values(attn, split_heads(attn.to_v(z), attn.kv_heads))
    return KeysValues(k, values, values if own is None else own)
