"""Checks that a cache from elsewhere holds what branches read of earlier tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.composition import ComposeHeads
from x_transformers.attention.path import HouseholderSteps
from x_transformers.cache.kv_cache import KVCache
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.convolution import TAPE, CausalConvolution
from x_transformers.layers.branch import ShiftTokens
from x_transformers.layers.layer import Layer
from x_transformers.layers.parts import StackParts
from x_transformers.layers.plan import Step
from x_transformers.layers.slots import STATE, has_state


def check_history(stack: StackParts, cache: KVCache, steps: Sequence[Step]) -> None:
    """Whether a cache that this stack has not made has what its branches need of earlier tokens beside keys and values."""
    if cache.cursor is not None or not cache.retained:
        return
    layers = stack._layers()

    def held(fits: Callable[[nn.Module], bool]) -> list[LayerCache]:
        """Of the layers with such a part, what the cache holds."""
        return [cache.step(step.index) for step in steps if any(map(fits, layers[step.layer].modules()))]

    shifting = held(lambda part: isinstance(part, ShiftTokens) and part.moves(stack.dim))
    convolving = held(lambda part: isinstance(part, CausalConvolution))
    remembering = held(lambda part: isinstance(part, Layer) and has_state(part.inside))
    composing = held(lambda part: isinstance(part, ComposeHeads))
    stepping = held(lambda part: isinstance(part, HouseholderSteps))
    narrowing = held(lambda part: isinstance(part, Attention) and part.to_latent_kv is not None)
    summing = [cache.step(step.index) for step in steps] if stack.flags.mv_split_residual else []
    lacking = {
        'the latents of keys and values': narrowing and not any('latent' in each.tapes for each in narrowing),
        'the tokens that canon convolves': convolving and not any(name.startswith(TAPE) for name in convolving[0].tapes),
        'the tokens that shift_tokens shifts': shifting and not any('shift' in each.tapes for each in shifting),
        'what keys say of compositions': composing and not any('compose' in each.tapes for each in composing),
        'the steps of accumulated positions': stepping and not any('path' in each.tapes for each in stepping),
        'the states of mixers': remembering and not any(STATE in each.carry for each in remembering),
        'the sums over earlier tokens that mv_split_residual needs': summing
        and not any('sums' in each.tapes for each in summing),
    }
    for what, lacks in lacking.items():
        if lacks:
            raise ValueError(
                f'the cache must hold {what}, got keys and values alone. '
                'Continue from the cache that a call returned, not from a cached_kv set by hand.'
            )
