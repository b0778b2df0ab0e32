"""Keys and values of another model, for the self attentions of this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from x_transformers.attention.inputs import ExtraKeys
from x_transformers.cache.intermediates import self_attention_kvs
from x_transformers.cache.kv_cache import KVCache
from x_transformers.helpers import detach_all
from x_transformers.layers.checks import is_bool, is_float, shape_of
from x_transformers.layers.plan import Step
from x_transformers.tensor_types import Bool

if TYPE_CHECKING:
    from x_transformers.layers.arguments import StackArgs
    from x_transformers.layers.parts import StackParts


def external_keys(stack: StackParts, args: StackArgs, steps: tuple[Step, ...], batch: int) -> tuple[ExtraKeys | None, ...]:
    """Keys and values of another model, one entry per executed self attention; fewer go to the top layers."""
    mask = args.additional_kv_mask
    if args.self_attn_additional_kv is None:
        return ()
    pairs = list(key_value_pairs(args.self_attn_additional_kv))
    if args.detach_additional_kv:
        pairs = detach_all(pairs)
    layers = sum(step.kind == 'a' for step in steps)
    if args.route_additional_kv_to_top:
        pairs = pairs[max(0, len(pairs) - layers) :]
        pairs = [None] * (layers - len(pairs)) + pairs
    for step, pair in zip((step for step in steps if step.kind == 'a'), pairs, strict=False):
        if pair is not None:
            flags = stack.flags.layer(step.layer).attention
            check_pair(pair, batch, flags.heads, flags.dim_head, flags.value_dim, mask)
    return tuple(None if pair is None else ExtraKeys(pair[0], pair[1], mask) for pair in pairs)


def key_value_pairs(source: Any) -> Sequence[Any]:
    """From a list, from what another model's forward returned, or from its cache."""
    if hasattr(source, 'attn_intermediates'):
        return self_attention_kvs(source)
    if isinstance(source, KVCache):
        from x_transformers.attention.inputs import cached_keys

        held = [layer for layer in source if not any(tape.fixed for tape in layer.tapes.values())]
        return [pair for pair in map(cached_keys, held) if pair is not None]
    if not isinstance(source, (list, tuple)):
        raise TypeError(
            'self_attn_additional_kv must be a list of (keys, values), or the LayerIntermediates or KVCache of another model, '
            f'got {shape_of(source)}'
        )
    return source


def check_pair(pair: Any, batch: int, heads: int, dim_head: int, value_dim: int, mask: Bool[Tensor, 'b m'] | None) -> None:
    """Raise a ValueError unless keys (b h m d) and values (b h m e) fit the heads here."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(is_float(t, 4) for t in pair):
        raise ValueError(
            'an entry of self_attn_additional_kv must be a pair of keys (b, h, m, d) and values (b, h, m, e); '
            'those of a model with latent keys and values are of another kind'
        )
    keys, values = pair
    if keys.shape[0] != batch or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f'keys {tuple(keys.shape)} and values {tuple(values.shape)} of self_attn_additional_kv must agree in batch '
            f'({batch}), heads and length'
        )
    if heads % keys.shape[1]:
        raise ValueError(
            f'keys of self_attn_additional_kv must have a number of heads that divides the {heads} heads here, got '
            f'{keys.shape[1]}. Repeat or leave out heads.'
        )
    if keys.shape[-1] != dim_head or values.shape[-1] != value_dim:
        raise ValueError(
            f'heads of self_attn_additional_kv must be {dim_head} (keys) and {value_dim} (values) wide, '
            f'got {keys.shape[-1]} and {values.shape[-1]}'
        )
    if mask is not None and (not is_bool(mask, 2) or mask.shape != (batch, keys.shape[2])):
        raise ValueError(f'additional_kv_mask must be boolean and ({batch}, {keys.shape[2]}), got {shape_of(mask)}')
