"""Whether a cache that somebody else has made holds what branches read of earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence

from x_transformers.cache.kv_cache import KVCache
from x_transformers.convolution import TAPE, CausalConvolution
from x_transformers.layers.branch import ShiftTokens
from x_transformers.layers.parts import StackParts
from x_transformers.layers.plan import Step


def check_history(stack: StackParts, cache: KVCache, steps: Sequence[Step]) -> None:
    """Whether a cache that this stack has not made has what its branches need of earlier tokens beside keys and values."""
    if cache.cursor is not None:
        return
    layers = stack._layers()
    shifting = [
        step.index
        for step in steps
        if any(isinstance(part, ShiftTokens) and part.moves(stack.dim) for part in layers[step.layer].modules())
    ]
    convolving = [
        step.index for step in steps if any(isinstance(part, CausalConvolution) for part in layers[step.layer].modules())
    ]
    if convolving and cache.retained and not any(name.startswith(TAPE) for name in cache.step(convolving[0]).tapes):
        raise ValueError(
            'the cache must hold the tokens that canon convolves, got keys and values alone. '
            'Continue from the cache that a call returned, not from a cached_kv set by hand.'
        )
    if stack.flags.mv_split_residual and cache.retained and not any('sums' in cache.step(step.index).tapes for step in steps):
        raise ValueError(
            'the cache must hold the sums over earlier tokens that mv_split_residual needs, got keys and values alone. '
            'Continue from the cache that a call returned, not from a cached_kv set by hand.'
        )
    if shifting and cache.retained and not any('shift' in cache.step(index).tapes for index in shifting):
        raise ValueError(
            'the cache must hold the tokens that shift_tokens shifts, got keys and values alone. '
            'Continue from the cache that a call returned, not from a cached_kv set by hand.'
        )
