"""Caches that a caller constructs: the ``cached_kv`` of each attention becomes buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from x_transformers.cache.tape import Tape
from x_transformers.tensor_types import Float


class HoldsCache(Protocol):
    """What ``cache=`` takes beside a ``KVCache``: what an earlier call has reported, ``LayerIntermediates``."""

    @property
    def kv_cache(self) -> Any: ...
    @property
    def cache_length(self) -> int: ...
    @property
    def attn_intermediates(self) -> Sequence[Any] | None: ...


def with_keys_by_hand(intermediates: HoldsCache, steps: Sequence[int] | None, new_cache: Callable[[int], Any]) -> Any:
    """The cache of these intermediates, with what their attentions hold in place of it.

    ``steps``: the execution step of each attention; consecutive unless given. ``new_cache`` makes one of so many rows.
    """
    held, attentions = getattr(intermediates, 'kv_cache', None), getattr(intermediates, 'attn_intermediates', None) or ()
    if held is not None:
        steps = [index for index in sorted(held.steps) if not {'v', 'latent'}.isdisjoint(held.steps[index].tapes)]
    by_hand = [
        (index, report)
        for index, report in zip(steps or range(len(attentions)), attentions, strict=False)
        # the caller made these, or put them in place of what the cache holds
        # asked last: of a cache, it would take the rotation off all keys
        if report is not None and (held is None or report.cache is None) and report.cached_kv is not None
    ]
    if held is not None and not by_hand:
        return held
    cache = new_cache(getattr(intermediates, 'cache_length', 0)) if held is None else held.fork()
    for index, report in by_hand:
        tapes = cache.step(index).tapes
        tapes.pop('angles', None)
        tapes.update(tapes_of_pair(report.cached_kv, fixed=report.layer_type == 'c'))
    return cache


def tapes_of_pair(pair: tuple[Float[Tensor, 'b ... j d'], Float[Tensor, 'b r j c'] | None], fixed: bool) -> dict[str, Tape]:
    """Tapes that hold keys (not rotated) and values, or latent and rotated-head keys."""
    # a latent has no heads
    names = ('latent', 'k_rope') if pair[0].ndim == 3 else ('k', 'v')
    return {name: Tape.of(tensor, fixed=fixed) for name, tensor in zip(names, pair, strict=True) if tensor is not None}
