"""The public keywords of an attention call: validation, conversion to ``BranchInputs``, and the tensors of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.inputs import BranchInputs, Deltas, ExtraKeys, Intermediates
from x_transformers.attention.mask import Mask, PackedSequences, describe
from x_transformers.attention.project import held_rows
from x_transformers.helpers import is_any
from x_transformers.tensor_types import Bool, Float, Shaped

if TYPE_CHECKING:
    from x_transformers.attention.parts import AttentionParts
    from x_transformers.cache.layer_cache import LayerCache
    from x_transformers.position.bias import Bias
    from x_transformers.position.positions import Positions

Keywords = dict[str, Any]

# of ``Attention.forward``
ARGUMENTS = {
    'context': 'Sequence that keys and values are made of, in place of x.',
    'mask': 'True for the tokens of x. Without a cache, the output is zero at the other positions. Without a context, they are '
    'not attended to. With a cache, the mask covers past and new keys.',
    'context_mask': 'True for the tokens of the context. Without a context: for the keys of x, in place of `mask`.',
    'attn_mask': 'True where a query may attend to a key.',
    'rel_pos': 'Module that computes a bias from the positions `pos`.',
    'attn_bias': 'Bias that is added to the scores.',
    'rotary_pos_emb': 'Rotary angles and scale, for at least as many positions as there are keys.',
    'context_rotary_pos_emb': 'Rotary angles and scale for the keys of the context.',
    'polar_pos_emb': 'Polar angles and bias.',
    'pos': 'Position ids of the tokens, for `rel_pos`.',
    'prev_attn': 'Scores of an earlier layer, which are added to the scores.',
    'mem': 'Memories: rows in front of x that keys and values are also made of.',
    'mem_mask': 'True for memories that may be attended to.',
    'return_intermediates': 'Also return Intermediates.',
    'cache': 'Intermediates of an earlier call, which x continues.',
    'value_residual': 'Values of the first layer, which are mixed into the values.',
    'additional_key_values': 'Keys and values in front of all others. Their number of heads must divide that of the queries.',
    'additional_key_value_mask': 'True for additional keys that may be attended to.',
    'kv_input_residual': 'Added to the input of the key and value projections.',
    'flash_pack_seq_kwargs': '`cu_seqlens_q` and `cu_seqlens_k` of the sequences that are packed into one row.',
    'causal': 'Whether this call is causal; None: as the layer was built.',
    'q_delta': 'Added to the projected queries.',
    'k_delta': 'Added to the projected keys, including those of memories.',
    'v_delta': 'Added to the projected values, including those of memories.',
    'o_delta': 'Added to the concatenated heads, before the gates.',
    'attn_delta': 'Added to the attention weights.',
    'around': 'All of these arguments in one checked object, as a stack passes them.',
}


def shaped(name: str, t: Any, *axes: int | None, note: str = '') -> None:
    """``t`` is a tensor with these axes; None stands for any length."""
    if not isinstance(t, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(t).__name__}')
    if t.ndim == len(axes) and all(want is None or want == have for want, have in zip(axes, t.shape, strict=True)):
        return
    wanted = ', '.join('any' if axis is None else str(axis) for axis in axes)
    raise ValueError(f'{name} must have shape ({wanted}){note and ", "}{note}, got shape {tuple(t.shape)}')


def summand(name: str, t: Any, whole: tuple[int, ...], note: str) -> None:
    """``t`` can be added to what has the shape ``whole``: axes of one, and missing ones, broadcast."""
    shape = tuple(t.shape) if isinstance(t, Tensor) else (None,) * len(whole)
    behind = whole[len(whole) - len(shape) :]
    if len(shape) > len(whole) or any(not is_any(have, 1, want) for have, want in zip(shape, behind, strict=True)):
        shaped(name, t, *whole, note=f'{note} (axes of 1 broadcast)')


def numbers(name: str, t: Shaped[Tensor, '...']) -> None:
    if not t.is_floating_point():
        raise TypeError(f'{name} must hold floating point numbers, got {t.dtype}')


def boolean(name: str, t: Any) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.bool:
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f'{name} must be a boolean tensor (True: a token, or may be seen), got {kind}. Use {name}.bool().')


def broadcasts(name: str, t: Any, batch: int, heads: int, queries: int, keys: tuple[int, ...]) -> None:
    """``t`` is (i j), (h i j) or (b h i j); axes of one, and missing ones, broadcast."""
    if not isinstance(t, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(t).__name__}')
    shape = (1,) * (4 - t.ndim) + tuple(t.shape)
    allowed = ((1, batch), (1, heads), (1, queries), (1, *keys))
    if t.ndim < 2 or t.ndim > 4 or any(not is_any(have, *may) for have, may in zip(shape, allowed, strict=True)):
        width = ' or '.join(str(length) for length in dict.fromkeys(keys))
        raise ValueError(
            f'{name} must be (i j), (h i j) or (b h i j) with b = {batch}, h = {heads}, i = {queries} queries and '
            f'j = {width} keys (axes of 1 broadcast), got shape {tuple(t.shape)}'
        )


# ---------------------------------------------------------------- tokens


def check_attention_input(attn: AttentionParts, x: Float[Tensor, '... n d'], keywords: Keywords) -> tuple[int, int, int]:
    """(batch, queries, own keys without memories and past)."""
    context, mem, shift = keywords['context'], keywords['mem'], keywords['kv_input_residual']
    if attn.separate_views:
        shaped('x', x, 3, None, None, attn.dim, note='views for queries, keys and values (qkv_receive_diff_residuals)')
        if context is not None:
            raise ValueError(
                'context must be None with qkv_receive_diff_residuals=True: x holds the views of keys and values. Leave it out.'
            )
    else:
        shaped('x', x, None, None, attn.dim, note='(batch, tokens, dim)')
    numbers('x', x)
    batch, queries = x.shape[-3], x.shape[-2]
    if context is not None:
        check_attention_context(attn, context, batch)
    elif attn.dim_context != attn.dim:
        raise ValueError(
            f'context must be given: keys and values are projected from a sequence of width {attn.dim_context} (dim_context).'
        )
    keys = queries if context is None else context.shape[1]
    if mem is not None:
        shaped('mem', mem, batch, None, attn.dim_context, note='(batch, memories, width of the keys)')
        numbers('mem', mem)
    if shift is not None:
        shaped('kv_input_residual', shift, batch, keys, attn.dim_context, note='that of the input of keys and values')
    return batch, queries, keys


def check_attention_context(attn: AttentionParts, context: Any, batch: int) -> None:
    shaped('context', context, batch, None, attn.dim_context, note='(batch, tokens, dim_context)')
    numbers('context', context)
    if attn.needing_own_keys:
        raise ValueError(
            f'context must be None with {attn.needing_own_keys[0]}, which needs keys of the same tokens as the queries. '
            'Leave out context, or the flag.'
        )


# ---------------------------------------------------------------- masks


def key_mask(keywords: Keywords, batch: int, mems: int, past: int, keys: int) -> Tensor | None:
    """Which own keys, in the order memories, past, new, may be seen."""
    name = 'mask' if keywords['context_mask'] is None and keywords['context'] is None else 'context_mask'
    mask, mem_mask = keywords[name], keywords['mem_mask']
    if mem_mask is not None:
        boolean('mem_mask', mem_mask)
        if mems == 0:
            raise ValueError('mem must be given with mem_mask. Pass mem, or leave out mem_mask.')
        shaped('mem_mask', mem_mask, batch, mems, note='(batch, memories)')
    if mask is not None:
        boolean(name, mask)
        if mask.ndim == 2 and mask.shape[1] == mems + past + keys and mems:
            return cast(Tensor, mask)
        shaped(name, mask, batch, past + keys, note='(batch, past and new keys)' if past else '(batch, tokens)')
    if not mems or (mask is None and mem_mask is None):
        return cast('Tensor | None', mask)
    if mem_mask is None:
        return F.pad(mask, (mems, 0), value=True)
    if mask is None:
        return F.pad(mem_mask, (0, past + keys), value=True)
    return torch.cat((mem_mask, mask), dim=-1)


def rows_to_keep(keywords: Keywords, batch: int, queries: int, past: int) -> Tensor | None:
    """Output rows of padding are zero; not while decoding."""
    mask: Tensor | None = keywords['mask']
    if mask is None:
        return None
    boolean('mask', mask)
    if keywords['cache'] is not None:
        shaped('mask', mask, batch, queries if keywords['context'] is not None else past + queries, note='past and new tokens')
        return None
    shaped('mask', mask, batch, queries, note='(batch, tokens)')
    return mask


def whole_mask(attn: AttentionParts, keywords: Keywords, sizes: tuple[int, int, int], mems: int, past: int) -> Mask:
    batch, queries, keys = sizes
    own = mems + past + keys
    dense = keywords['attn_mask']
    if dense is not None:
        boolean('attn_mask', dense)
        broadcasts('attn_mask', dense, batch, attn.heads, queries, (own, own + front_columns(attn, keywords)))
    return Mask(keys=key_mask(keywords, batch, mems, past, keys), dense=dense)


def front_columns(attn: AttentionParts, keywords: Keywords) -> int:
    extra = keywords['additional_key_values']
    return attn.num_mem_kv + (0 if extra is None else int(extra[0].shape[-2]))


# ---------------------------------------------------------------- positions


def check_angles(name: str, pair: Any) -> None:
    """Raise TypeError for what no embedding of positions gives, such as its angles alone."""
    fits = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], Tensor)
    if not fits or not pair[0].is_floating_point() or pair[0].ndim not in (2, 3):
        got = describe(pair) if isinstance(pair, Tensor) else f'a {type(pair).__name__}'
        raise TypeError(f'{name} must be what the embedding returns, (angles, scale or bias), got {got}')


def call_positions(attn: AttentionParts, keywords: Keywords) -> Positions | None:
    rotary, context_rotary, polar = (keywords[name] for name in ('rotary_pos_emb', 'context_rotary_pos_emb', 'polar_pos_emb'))
    if rotary is not None and polar is not None:
        raise ValueError('rotary_pos_emb and polar_pos_emb must not both be given. Leave out one of them.')
    if polar is not None:
        from x_transformers.position.positions import PolarPositions

        if keywords['context'] is not None:
            raise ValueError('polar_pos_emb must be None with context: it is for self attention. Leave out one of them.')
        check_angles('polar_pos_emb', polar)
        return PolarPositions(*polar)
    if (rotary is None or keywords['context'] is None) and context_rotary is not None:
        raise ValueError('context and rotary_pos_emb must be given with context_rotary_pos_emb. Pass both, or leave it out.')
    if rotary is None:
        return None
    from x_transformers.position.positions import RotaryPositions

    if keywords['context'] is not None and context_rotary is None:
        raise ValueError('context_rotary_pos_emb must be given with rotary_pos_emb and context. Pass the context positions.')
    check_angles('rotary_pos_emb', rotary)
    freqs, scale = rotary
    if context_rotary is not None:
        check_angles('context_rotary_pos_emb', context_rotary)
    return RotaryPositions(freqs, scale, context_rotary)


def call_bias(attn: AttentionParts, keywords: Keywords, sizes: tuple[int, int, int], own: int) -> Bias | None:
    rel_pos, attn_bias, pos = keywords['rel_pos'], keywords['attn_bias'], keywords['pos']
    if rel_pos is not None and attn_bias is not None:
        raise ValueError('rel_pos and attn_bias must not both be given: both are added to the scores. Pass their sum as one.')
    from x_transformers.position.bias import DenseBias
    from x_transformers.position.relative import DistanceBias, RelativeBias

    if rel_pos is not None:
        if not isinstance(rel_pos, DistanceBias):
            raise TypeError(f'rel_pos must be a module such as AlibiPositionalBias, got {type(rel_pos).__name__}')
        return RelativeBias(rel_pos, positions=pos)
    if attn_bias is None:
        return None
    broadcasts('attn_bias', attn_bias, sizes[0], attn.heads, sizes[1], (own, own + front_columns(attn, keywords)))
    numbers('attn_bias', attn_bias)
    return DenseBias(attn_bias)


# ---------------------------------------------------------------- other layers and models


def extra_keys(attn: AttentionParts, keywords: Keywords, batch: int) -> ExtraKeys | None:
    pair, mask = keywords['additional_key_values'], keywords['additional_key_value_mask']
    if pair is None:
        if mask is not None:
            raise ValueError('additional_key_values must be given with additional_key_value_mask. Pass both, or neither.')
        return None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError('additional_key_values must be a pair: keys (b h m d) and values (b h m e)')
    keys, values = pair
    shaped('additional_key_values: keys', keys, batch, None, None, attn.dim_head, note='(batch, heads, m, dim_head)')
    heads, length = keys.shape[1], keys.shape[2]
    shaped(
        'additional_key_values: values',
        values,
        batch,
        heads,
        length,
        attn.value_dim_head,
        note='(batch, heads, m, value_dim_head)',
    )
    if attn.heads % heads:
        raise ValueError(f'additional_key_values have {heads} heads, which must divide the {attn.heads} query heads')
    if mask is not None:
        boolean('additional_key_value_mask', mask)
        shaped('additional_key_value_mask', mask, batch, length, note='(batch, m)')
    return ExtraKeys(keys, values, mask)


def deltas(attn: AttentionParts, keywords: Keywords, sizes: tuple[int, int, int], mems: int, own: int) -> Deltas:
    """What is added to projections, heads and weights, in whole and in the right shape."""
    batch, queries, keys = sizes
    front = front_columns(attn, keywords)
    wanted = {
        'q_delta': (queries, attn.heads * attn.dim_head, 'that of the projected queries'),
        'k_delta': (mems + keys, attn.kv_heads * attn.dim_head, 'that of the projected keys'),
        'v_delta': (mems + keys, attn.kv_heads * attn.value_dim_head, 'that of the projected values'),
        'o_delta': (queries, attn.heads * attn.value_dim_head, 'that of the heads side by side'),
    }
    for name, (length, width, note) in wanted.items():
        if keywords[name] is not None:
            summand(name, keywords[name], (batch, length, width), note)
            numbers(name, keywords[name])
    for name in ('k_delta', 'v_delta'):
        if keywords[name] is not None and attn.to_latent_kv is not None:
            raise ValueError(
                f'{name} must not be given with use_latent_kv or tensor_product: keys and values are made of the cache anew.'
            )
    weights = keywords['attn_delta']
    if weights is not None:
        broadcasts('attn_delta', weights, batch, attn.heads, queries, (own, own + front))
        numbers('attn_delta', weights)
    return Deltas(keywords['q_delta'], keywords['k_delta'], keywords['v_delta'], keywords['o_delta'], weights)


def check_attention_causal(attn: AttentionParts, causal: Any) -> None:
    if causal is None:
        return
    if not isinstance(causal, bool):
        raise TypeError(f'causal must be True, False or None, got {causal!r}.')
    if causal != attn.causal and attn.flags.tied_to_causality:
        raise ValueError(
            f'causal must be {attn.causal}, as this layer was built, got {causal}: '
            f'{", ".join(attn.flags.tied_to_causality)} depends on it. Build a layer for each.'
        )


def past_of(attn: AttentionParts, keywords: Keywords) -> LayerCache | None:
    """A cache to write into: a fork of the given one, or a new one if it will be handed out."""
    from x_transformers.cache.layer_cache import LayerCache

    cache: Intermediates | None = keywords['cache']
    if cache is None:
        return LayerCache() if keywords['return_intermediates'] else None
    if not isinstance(cache, Intermediates):
        raise TypeError(f'cache must be the Intermediates of an earlier call, got {type(cache).__name__}')
    if not attn.can_cache_kv:
        raise ValueError(f'cache must be None with {attn.why_no_cache[0]}. Pass the whole sequence.')
    if cache.cache is not None:
        return cache.cache.fork()
    past = LayerCache()
    if cache.hybrid_hidden is not None:
        past.carry['hybrid'] = cache.hybrid_hidden
    if cache.cached_kv is None:
        return past
    names = ('k', 'v') if attn.to_latent_kv is None else ('latent', 'k_rope')
    for name, rows in zip(names, cache.cached_kv, strict=True):
        if rows is not None:
            past.extend(**{name: rows}) if keywords['context'] is None else past.fixed(name, rows)
    return past


def branch_inputs(attn: AttentionParts, x: Float[Tensor, '... n d'], keywords: Keywords) -> BranchInputs:
    """What surrounds an attention, from the keywords of ``Attention.forward``."""
    check_attention_causal(attn, keywords['causal'])
    batch, queries, keys = check_attention_input(attn, x, keywords)
    past = past_of(attn, keywords)
    held = 0 if past is None or keywords['context'] is not None else past.length
    if keywords['context'] is not None:
        fixed = [name for name in ('k_delta', 'v_delta') if keywords[name] is not None]
        if fixed and held_rows(past, 'k'):
            raise ValueError(f'{" and ".join(fixed)} must not be given: the cache holds the keys and values of the context.')
        # what a cache holds of the context counts, not what is given again
        keys = max(held_rows(past, 'k'), held_rows(past, 'latent')) or keys
    sizes = (batch, queries, keys)
    mems = 0 if keywords['mem'] is None else keywords['mem'].shape[1]
    own = mems + held + keys
    extra = extra_keys(attn, keywords, batch)
    first, previous, packed = keywords['value_residual'], keywords['prev_attn'], keywords['flash_pack_seq_kwargs']
    if first is not None:
        shaped('value_residual', first, batch, attn.kv_heads, mems + keys, attn.value_dim_head, note='that of the own values')
    if previous is not None:
        shaped('prev_attn', previous, batch, attn.heads, queries, None, note='the scores of an earlier layer')
    if packed is not None and not attn.flags.flash_pack_seq:
        raise ValueError('flash_pack_seq_kwargs must be None without flash_pack_seq=True. Build the attention with that flag.')
    rows = rows_to_keep(keywords, batch, queries, held)
    causal = attn.causal if keywords['causal'] is None else keywords['causal']
    return BranchInputs(
        context=keywords['context'],
        mask=whole_mask(attn, keywords, sizes, mems, held),
        rows=rows,
        bias=call_bias(attn, keywords, sizes, own),
        positions=call_positions(attn, keywords),
        mem=keywords['mem'],
        previous=previous,
        first_values=first,
        extra=extra,
        kv_shift=keywords['kv_input_residual'],
        past=past,
        packed=None if packed is None else PackedSequences.of(packed, causal=causal),
        padding=keywords['mask'],
        return_attn=keywords['return_intermediates'],
        deltas=deltas(attn, keywords, sizes, mems, own),
        causal=keywords['causal'],
    )


# ---------------------------------------------------------------- attention proper


def check_vectors(q: Any, k: Any, v: Any) -> None:
    """Queries, keys and values that go together."""
    for name, t in (('q', q), ('k', k), ('v', v)):
        shaped(name, t, None, None, None, None, note='(batch, heads, tokens, channels)')
        numbers(name, t)
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f'k must have a number of heads that divides the {q.shape[1]} query heads, got {k.shape[1]}. Repeat or leave '
            'out heads.'
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f'v must hold one value for each key, got keys {tuple(k.shape)} and values {tuple(v.shape)}. Pass as many of both.'
        )
    if q.shape[-1] != k.shape[-1] or not is_any(k.shape[0], 1, q.shape[0]):
        raise ValueError(
            f'k must have the batch and the channels of q, {q.shape[0]} and {q.shape[-1]}, got shape {tuple(k.shape)}.'
        )


def check_attend(
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    mask: Bool[Tensor, '...'] | None,
    prev_attn: Float[Tensor, 'b h i j'] | None,
    packed: Any,
    *,
    flash: bool,
) -> None:
    """What goes with queries and keys fits them."""
    batch, heads, queries, keys = (*q.shape[:3], k.shape[2])
    if mask is not None:
        boolean('mask', mask)
        if mask.ndim == 2:
            shaped('mask', mask.expand(batch, -1) if len(mask) == 1 else mask, batch, keys, note='one entry per key')
        else:
            broadcasts('mask', mask, batch, heads, queries, (keys,))
    if prev_attn is not None:
        # a layer may have more keys in front than the one before
        columns = prev_attn.shape[-1:] if isinstance(prev_attn, Tensor) else ()
        broadcasts('prev_attn', prev_attn, batch, heads, queries, (keys, *columns))
    if prev_attn is not None and flash:
        raise ValueError('prev_attn must be None with flash=True, which never holds scores. Leave one of the two out.')
    if packed is not None and q.shape[0] != 1:
        raise ValueError(f'packed sequences lie end to end in one row: the batch must be 1, got {q.shape[0]}')
