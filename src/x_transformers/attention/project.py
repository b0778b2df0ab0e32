"""Projections from tokens to key and value heads, appended to those of the past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.heads import split_heads, with_memories
from x_transformers.attention.parts import AttentionParts, Seen
from x_transformers.attention.qk_norm import normed_keys
from x_transformers.attention.values import mixed_values, normed_values
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.cache.layer_cache import LayerCache
    from x_transformers.embedding.values import TokenValues
    from x_transformers.position.positions import Positions


class KeysValues(NamedTuple):
    """``keys`` are normed and placed, ``values`` mixed and normed; ``own`` are the values of these very tokens before that."""

    keys: Float[Tensor, 'b kh j d']
    values: Float[Tensor, 'b kh j e']
    own: Float[Tensor, 'b kh m e']


def gather(attn: AttentionParts, x: Float[Tensor, '... n d'], inputs: BranchInputs) -> Seen:
    """Who reads what: separate views or one input, the context, the shift of keys and values, memories in front."""
    if attn.separate_views:
        queries, keys, values = x.unbind(0)
    else:
        queries = x
        keys = values = x if inputs.context is None else inputs.context
    own = queries
    same = keys is values
    if inputs.kv_shift is not None:
        keys = keys + inputs.kv_shift
        values = keys if same else values + inputs.kv_shift
    if inputs.mem is not None:
        keys = with_memories(keys, inputs.mem)
        values = keys if same else with_memories(values, inputs.mem)
    if attn.to_latent_q is not None:
        queries = attn.to_latent_q(queries)
    return Seen(own, queries, keys, values, 0 if inputs.mem is None else inputs.mem.shape[-2])


def append_to_past(past: LayerCache | None, mems: int, cross: bool, **new: Float[Tensor, 'b ... n c']) -> tuple[Tensor, ...]:
    """All rows in the order memories, past, new. Memories are not cached; a context is cached once, as it is."""
    if past is None:
        return tuple(new.values())
    if cross:
        for name, rows in new.items():
            past.fixed(name, rows)
        return tuple(new.values())
    if mems == 0:
        return past.extend(**new)
    whole = past.extend(**{name: rows[..., mems:, :] for name, rows in new.items()})
    return tuple(torch.cat((rows[..., :mems, :], held), dim=-2) for rows, held in zip(new.values(), whole, strict=True))


def held_rows(past: LayerCache | None, name: str) -> int:
    held = None if past is None else past.get(name)
    return 0 if held is None else held.shape[-2]


def keys_values(attn: AttentionParts, seen: Seen, inputs: BranchInputs) -> KeysValues:
    """Keys and values straight from the tokens."""
    cross = inputs.context is not None
    if cross and held_rows(inputs.past, 'k'):
        return cross_from_cache(attn, inputs)
    own, k, deltas = attn.to_v(seen.values), attn.to_k(seen.keys), inputs.deltas
    # what most layers do without is asked here: a call that does nothing is made for each layer and token
    if deltas.values is not None:
        own = own + deltas.values
    if deltas.keys is not None:
        k = k + deltas.keys
    if attn.convolutions is not None:
        own, k = convolved(attn, 'v', own, inputs, seen.mems), convolved(attn, 'k', k, inputs, seen.mems)
    own, k = split_heads(own, attn.kv_heads), split_heads(k, attn.kv_heads)
    if inputs.token_values is not None:
        own = with_token_values(own, seen, inputs.token_values)
    v = own if inputs.first_values is None else mixed_values(attn, own, seen, inputs)
    if attn.value_rmsnorm is not None:
        v = normed_values(attn, v)
    if attn.qk_norm or attn.k_rmsnorm is not None:
        k = normed_keys(attn, k)
    positions = inputs.positions
    if keeps_placed(positions, inputs.past, cross):
        k, v = place_and_remember(attn, k, v, seen.mems, inputs)
        return KeysValues(k, v, own)
    k, v = append_to_past(inputs.past, seen.mems, cross, k=k, v=v)
    if positions is not None:
        k = positions.keys(k, attn.rotated_heads)
    return KeysValues(k, v, own)


def convolved(
    attn: AttentionParts, name: str, t: Float[Tensor, 'b m c'], inputs: BranchInputs, mems: int = 0
) -> Float[Tensor, 'b m c']:
    """Queries, keys or values with a convolution over the tokens of this sequence; memories in front stay as they are."""
    if inputs.context is not None:
        raise ValueError(
            f'context must be left out with {attn.flags!r}, which convolves over one sequence. Build it without canon.'
        )
    convolutions: Any = attn.convolutions
    new: Tensor = convolutions[name](t[:, mems:], inputs.padding, inputs.past)
    return torch.cat((t[:, :mems], new), dim=1) if mems else new


def with_token_values(own: Float[Tensor, 'b kh m e'], seen: Seen, token_values: TokenValues) -> Float[Tensor, 'b kh m e']:
    """Values with what a table has for each token; memories have no tokens."""
    module, ids = token_values
    new: Tensor = module(seen.values[..., seen.mems :, :], ids).to(own.dtype)
    return own + F.pad(new, (0, 0, seen.mems, 0))


def cross_from_cache(attn: AttentionParts, inputs: BranchInputs) -> KeysValues:
    """A context's keys and values do not change: those of the first step are taken."""
    past = cast('LayerCache', inputs.past)
    k, v = cast(Tensor, past.get('k')), cast(Tensor, past.get('v'))
    placed = k if inputs.positions is None else inputs.positions.keys(k, attn.rotated_heads)
    return KeysValues(placed, v, v)


# ---------------------------------------------------------------- keys that are cached with their rotation


def keeps_placed(positions: Positions | None, past: LayerCache | None, cross: bool) -> bool:
    """Whether this cache holds rotated keys, so that only new ones are rotated. One that began unrotated stays so."""
    if past is None or cross:
        return False
    begun_placed = 'angles' in past.tapes
    if positions is None or positions.cache_form != 'positioned':
        if begun_placed:
            raise ValueError(
                'positions must be given to all calls or to none, got a cache of rotated keys and no rotary positions. '
                'Pass rotary_pos_emb.'
            )
        return False
    return begun_placed or 'k' not in past.tapes


def place_and_remember(
    attn: AttentionParts, k: Float[Tensor, 'b kh m d'], v: Float[Tensor, 'b kh m e'], mems: int, inputs: BranchInputs
) -> tuple[Tensor, ...]:
    """Rotate memories and new keys, append the new ones. Their angles are kept, so that the rotation can be undone."""
    past: Any = inputs.past
    positions: Any = inputs.positions
    new = k.shape[-2] - mems
    if mems:
        # between the positions of the memories and those of the new keys lie those of the past, if there are rows for them
        rest = positions.key_rows - mems
        behind = rest if positions.places_new else min(held_rows(past, 'k') + new, rest)
        memories = positions.keys(k[..., :mems, :], attn.rotated_heads, before=behind)
        k = torch.cat((memories, positions.new_keys(k[..., mems:, :], attn.rotated_heads)), dim=-2)
    else:
        k = positions.new_keys(k, attn.rotated_heads)
    past.carry['rotated_heads'] = attn.rotated_heads
    if positions.form is not None:
        past.carry['rotary_form'] = positions.form
    positions.keep_angles(past, new, k.shape[0])
    return append_to_past(past, mems, False, k=k, v=v)
