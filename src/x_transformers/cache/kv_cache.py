"""The key-value cache of a stack: named buffers for each execution step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias, Union, cast

import torch
from torch import Tensor

from x_transformers.cache.by_hand import HoldsCache, with_keys_by_hand
from x_transformers.cache.cursor import Cursor
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.cache.states import without_history
from x_transformers.cache.tape import FixedTape, keep_sharing
from x_transformers.tensor_types import Bool, Int

# pickles look for a layer's memory here, too
__all__ = ['Cache', 'KVCache', 'LayerCache']

Cache: TypeAlias = Union['KVCache', HoldsCache, None]


class KVCache:
    """The memory of a whole stack, by execution step (not by module: a layer that is executed twice has two).

    ``length`` counts the rows seen, those that have left the window too; ``retained`` those still held. ``front`` says how many
    of the rows seen were no tokens of the sequence (prepended embeddings, cls tokens): the next token's position is
    ``length - front``.

    Methods return a new cache and leave this one valid. A forward pass works on ``cache.fork()``, calls ``advance`` with the
    number of rows it has processed and returns that fork.
    """

    __slots__ = ('_length', 'cursor', 'front', 'front_held', 'known', 'pos_offset', 'steps', 'uncounted')

    def __init__(self, length: int = 0, front: int = 0) -> None:
        self._length = length
        self.front = front
        self.steps: dict[int, LayerCache] = {}
        self.cursor: Cursor | None = None
        # what was added to counted positions (``seq_pos_offset``), for tokens that follow
        self.pos_offset = 0
        # rows that had been seen and dropped before ``length`` began to count
        self.uncounted = 0
        # the stack that has handed it out, by its id
        self.known: int | None = None
        # of a fixed capacity: how many of the rows in front it began with
        self.front_held = 0

    @property
    def length(self) -> int:
        return self._length if self.cursor is None else int(self.cursor.seen)

    @staticmethod
    def of(cache: Cache, steps: Sequence[int] | None = None) -> KVCache | None:
        """The cache behind what a caller hands over as ``cache=``; ``steps``: the execution step of each of its attentions."""
        if cache is None or isinstance(cache, KVCache):
            return cache
        attentions, held = getattr(cache, 'attn_intermediates', None), getattr(cache, 'kv_cache', None)
        if attentions is None and held is None:
            raise TypeError(
                'cache must be a KVCache or the LayerIntermediates of an earlier call (return_intermediates=True), '
                f'got {type(cache).__name__}'
            )
        if held is not None and not attentions:
            return cast(KVCache, held)
        return cast(KVCache, with_keys_by_hand(cache, steps, KVCache))

    @property
    def retained(self) -> int:
        """Rows that self attention still holds."""
        if self.cursor is not None:
            return int(self.cursor.row)
        # asked several times for every token that is decoded: no property of a layer is called
        most = 0
        for layer in self.steps.values():
            for tape in layer.tapes.values():
                if tape.length > most and not tape.fixed:
                    most = tape.length
        return most

    @property
    def can_rollback(self) -> bool:
        return all(layer.can_rollback for layer in self.steps.values())

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.steps.values())

    def step(self, index: int) -> LayerCache:
        """The cache of execution step ``index``, made when first asked for."""
        layer = self.steps.get(index)
        if layer is None:
            layer = self.steps[index] = LayerCache(self.cursor)
        return layer

    def advance(self, rows: int) -> None:
        """Count ``rows`` more as seen."""
        if self.cursor is None:
            self._length += rows
        else:
            self.cursor.row.add_(rows)
            self.cursor.seen.add_(rows)

    def _mapped(self, change: Callable[[LayerCache], LayerCache], length: int | None = None) -> KVCache:
        copied = KVCache(self._length if length is None else length, self.front)
        copied.pos_offset, copied.known, copied.uncounted = self.pos_offset, self.known, self.uncounted
        copied.steps = {index: change(layer) for index, layer in self.steps.items()}
        if self.cursor is not None:
            copied._at(self.cursor if length is None else self.cursor.moved(length - self.length), self.front_held)
        return copied

    def _at(self, cursor: Cursor, front_held: int) -> None:
        self.cursor, self.front_held = cursor, front_held
        for layer in self.steps.values():
            layer.cursor = cursor

    def fork(self) -> KVCache:
        """A snapshot that can be continued independently, at no cost. (Of a fixed capacity: the same memory.)"""
        return self._mapped(LayerCache.fork)

    def fixed(self, capacity: int, reach: int | None = None) -> KVCache:
        """The same in memory of fixed shape, for ``capacity`` rows in all: what a compiled program reads and writes.

        It is written in place, so it is no value: whoever continues it moves it on. ``reach``: a token sees only so many rows,
        itself included, as with ``window``. Raises ValueError if the rows do not fit, or if a state without history is held.
        """
        held = self.retained
        if capacity < held:
            raise ValueError(f'capacity must be at least the {held} rows that are held, got {capacity}')
        if not self.can_rollback:
            names = sorted({name for layer in self for name in without_history(layer.states, layer.carry)})
            raise ValueError(
                f'cache must hold rows alone to get a fixed capacity, got a state without history ({", ".join(names)}). '
                'Continue the cache itself.'
            )
        device = next((tape.value.device for layer in self for tape in layer.tapes.values()), None)
        # written by whoever reads, in inference mode or not
        with torch.inference_mode(False):
            change = keep_sharing(partial(FixedTape.of_tape, held=held, capacity=capacity))
            copied = self._mapped(lambda layer: layer.changed(change))
            row, seen = (torch.tensor([number], device=device) for number in (held, self.length))
        copied._at(Cursor(row, seen, capacity, reach), max(self.front - (self.length - held), 0))
        return copied

    def visible(self) -> Bool[Tensor, '1 j'] | None:
        """Which rows of a fixed capacity are written; None: all rows that are held."""
        cursor = self.cursor
        return None if cursor is None else (torch.arange(cursor.capacity, device=cursor.row.device) < cursor.row)[None]

    def rollback(self, length: int, own: bool = False) -> KVCache:
        """As it was when ``length`` rows had been seen.

        ``own``: the caller holds the last reference to this cache and its forks, so its memory may be overwritten.
        Raises ValueError if those rows have left the window, or if a state without history is held.
        """
        removed = self.length - length
        if removed < 0 or removed > self.retained:
            raise ValueError(
                f'length must lie within the newest {self.retained} of {self.length} rows, which are all that the cache '
                f'still holds, got {length}. Keep a fork() from before.'
            )
        cut = keep_sharing(lambda tape: tape if tape.fixed else tape.cut(tape.length - removed, own))
        return self._mapped(lambda layer: layer.shortened(removed, cut), length)

    def window(self, last: int) -> KVCache:
        """Only the newest ``last`` rows of self attention; ``length`` stays."""
        newest = keep_sharing(lambda tape: tape.last(last))
        return self._mapped(lambda layer: layer.changed(newest))

    def begun(self) -> KVCache:
        """The same, counted from the oldest row held: as if the rows before it had never been seen, though places stay."""
        held = self.retained
        copied = self._mapped(LayerCache.fork, held)
        copied.uncounted = self.uncounted + self.length - held
        return copied

    def reorder(self, rows: Int[Tensor, ' r'], context: bool = True) -> KVCache:
        """Batch rows gathered by ``rows``: permuted, repeated or chosen.

        ``context=False``: each row keeps its context, so fixed tapes are not gathered (beams of one prompt share theirs).
        """
        # a layer without keys of its own does not know how many rows there are
        batch = next((tape.batch for layer in self for tape in layer.tapes.values()), None)
        gathered = keep_sharing(lambda tape: tape.rows(rows) if context or not tape.fixed else tape)
        return self._mapped(lambda layer: layer.reordered(rows, gathered, batch))

    def reserve(self, more: int) -> KVCache:
        """Told that ``more`` rows will follow, so that the first append makes room for all of them."""
        reserved = keep_sharing(lambda tape: tape.reserved(more))
        return self._mapped(lambda layer: layer.changed(reserved))

    def bytes(self) -> int:
        """Bytes of what is held, without spare room; what layers share counts once."""
        tapes = {id(tape): tape for layer in self for tape in layer.tapes.values()}
        states = [state for layer in self for state in layer.states.values()]
        return sum(tape.nbytes() for tape in tapes.values()) + sum(t.numel() * t.element_size() for t in states)

    def __repr__(self) -> str:
        return f'KVCache(length={self.length}, retained={self.retained}, steps={len(self.steps)})'
