"""Decoding with buffers of fixed shape, so one compiled program, or one CUDA graph, reads every token."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache.cursor import Cursor
from x_transformers.cache.kv_cache import Cache, KVCache
from x_transformers.cache.tape import FixedTape
from x_transformers.tensor_types import Float, Int, Shaped

__all__ = ['Continuation', 'Programs', 'compile_refusals']

# capacities are rounded up to multiples of so many rows, so that texts of about the same length share a program
ROWS = 64


class Continuation:
    """A model that goes on where a cache ends, in memory for ``capacity`` rows: the same forward as everywhere else.

    ``read(ids)`` takes the tokens that come next, one or several, and returns the logits after each of them. The cache that is
    given stays as it was. Not for training: nothing is recorded for gradients.

    Args:
        net: a model of this library with a cache.
        cache: what an earlier call returned: a ``KVCache``, or ``LayerIntermediates``.
        capacity: rows that there is room for, those of the cache included.
        compile: read with one compiled program, on GPU with one CUDA graph. The first read compiles.
        reach: how many rows a token sees at most, itself included; None: all of them.

    Raises ValueError if the model cannot go on in such memory, or if the rows do not fit.
    """

    # who reads with it now
    reader: weakref.ref[object] | None = None

    def __init__(self, net: nn.Module, cache: Cache, *, capacity: int, compile: bool = False, reach: int | None = None) -> None:
        if reasons := compile_refusals(net):
            raise ValueError(
                f'net must be able to decode in buffers of fixed shape: {"; ".join(reasons)}. Use the cache itself.'
            )
        held = KVCache.of(cache)
        if held is None:
            raise ValueError('cache must be that of an earlier call, got None. Read the beginning of the text first.')
        self.net, self.capacity, self.reach = net, capacity, reach
        self.cache = held.fixed(capacity, reach)
        self.length, self.seen = held.retained, held.length
        self._read: Callable[..., Any] = self._step
        # kinds of calls that this text has been read with
        self._kinds: set[Any] = set()
        self._compiled = compile
        if compile:
            self._read = torch.compile(own_copy(self._step), fullgraph=True, dynamic=False, **self._options())

    def _options(self) -> dict[str, Any]:
        tensors = [tape.value for layer in self.cache for tape in layer.tapes.values()]
        if self._cursor.row.device.type == 'cpu':
            return {'options': {'cpp_wrapper': True}}
        # what is written in place may be part of a CUDA graph if it stays where it is
        for tensor in (self._cursor.row, self._cursor.seen, *tensors):
            torch._dynamo.mark_static_address(tensor)
        return {'mode': 'reduce-overhead'}

    @property
    def _cursor(self) -> Cursor:
        cursor = self.cache.cursor
        if cursor is None:
            raise RuntimeError('the memory of a continuation has no cursor')
        return cursor

    def read(self, ids: Int[Tensor, 'b k'], **keywords: Any) -> Float[Tensor, 'b k v']:
        """The logits after each of these tokens, which come next. ``keywords``: further keywords of the model's forward."""
        new = ids.shape[1]
        if self.length + new > self.capacity:
            raise ValueError(
                f'ids must be at most {self.capacity - self.length} tokens, as {self.length} of capacity={self.capacity} are '
                f'taken, got {new}. Make a Continuation of a larger capacity.'
            )
        last = self.seen - self.cache.front + new
        limit = position_limit(self.net)
        if limit is not None and last > limit and keywords.get('pos') is None:
            raise ValueError(
                f'ids must end before position {limit} (max_seq_len), got position {last}. Shorten the text, or use '
                'rotary_pos_emb=True.'
            )
        with torch.no_grad(), self._stance(ids, keywords):
            logits: Tensor = self._read(ids, keywords)
        self.length, self.seen = self.length + new, self.seen + new
        return logits.clone() if self._compiled and logits.device.type != 'cpu' else logits

    def _stance(self, ids: Int[Tensor, 'b n'], keywords: dict[str, Any]) -> Any:
        """Whether the model is still what was compiled is asked once for each text."""
        if not self._compiled:
            return nullcontext()
        kind = (ids.shape, *((name, getattr(value, 'shape', None)) for name, value in keywords.items()))
        known = self._kinds == {kind}
        self._kinds.add(kind)
        stance: Any = torch.compiler.set_stance(skip_guard_eval_unsafe=True) if known else nullcontext()
        return stance

    def _step(self, ids: Int[Tensor, 'b k'], keywords: dict[str, Any]) -> Float[Tensor, 'b k v']:
        logits: Tensor = self.net(ids, cache=self.cache, input_not_include_cache=True, **keywords)
        return logits

    # ------------------------------------------------------------ another text in the same memory

    def fits(self, net: nn.Module, cache: KVCache, capacity: int, reach: int | None) -> bool:
        """Whether another text could be put into this memory, so that nothing need be compiled anew."""
        if net is not self.net or (capacity, reach) != (self.capacity, self.reach):
            return False
        mine = {(index, name): tape.value for index, layer in self.cache.steps.items() for name, tape in layer.tapes.items()}
        others = {(index, name): tape for index, layer in cache.steps.items() for name, tape in layer.tapes.items()}
        return mine.keys() == others.keys() and all(alike(mine[key], others[key]) for key in mine)

    def begin(self, cache: KVCache) -> None:
        """Go on where another cache ends, which ``fits``."""
        for index, mine in self.cache.steps.items():
            other = cache.steps[index]
            mine.carry, mine.carry_axis = other.carry.copy(), other.carry_axis.copy()
            for name, tape in mine.tapes.items():
                value = other.tapes[name].value
                if isinstance(tape, FixedTape):
                    tape.value.narrow(-2, 0, value.shape[-2]).copy_(value)
                    tape.value.narrow(-2, value.shape[-2], self.capacity - value.shape[-2]).zero_()
                else:
                    tape.value.copy_(value)
        held = cache.retained
        self._cursor.row.fill_(held)
        self._cursor.seen.fill_(cache.length)
        self.cache.front, self.cache.pos_offset, self.cache.uncounted = cache.front, cache.pos_offset, cache.uncounted
        self.cache.front_held = max(cache.front - (cache.length - held), 0)
        self.length, self.seen = held, cache.length
        self._kinds.clear()


class Programs:
    """The compiled continuations of a model: the newest are kept, as compiling takes its time."""

    KEPT = 4

    def __init__(self) -> None:
        self.kept: list[Continuation] = []

    def continuation(self, net: nn.Module, cache: KVCache, *, expected: int, reach: int | None, reader: object) -> Continuation:
        """One that goes on where the cache ends, compiled anew only for other shapes or for longer texts.

        It belongs to ``reader`` for as long as that one is there: texts that are written at the same time have one each.
        """
        capacity = -(-(cache.retained + expected) // ROWS) * ROWS
        continuation = next((each for each in self.kept if not is_read(each) and each.fits(net, cache, capacity, reach)), None)
        if continuation is None:
            continuation = Continuation(net, cache, capacity=capacity, compile=True, reach=reach)
        else:
            self.kept.remove(continuation)
            continuation.begin(cache)
        continuation.reader = weakref.ref(reader)
        self.kept = [*self.kept, continuation][-self.KEPT :]
        return continuation


def is_read(continuation: Continuation) -> bool:
    return continuation.reader is not None and continuation.reader() is not None


def alike(mine: Shaped[Tensor, '... n c'], tape: Any) -> bool:
    other: Tensor = tape.value
    shapes = (mine.shape, other.shape) if tape.fixed else (mine[..., :0, :].shape, other[..., :0, :].shape)
    return shapes[0] == shapes[1] and mine.dtype == other.dtype and mine.device == other.device


def own_copy(method: Any) -> Any:
    """The same method with a code object of its own, by which the compiler keeps its programs: few for each."""
    function = method.__func__
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return MethodType(twin, method.__self__)


def position_limit(net: nn.Module) -> int | None:
    """How many absolute positions there are, if they are a table."""
    from x_transformers.position.absolute import AbsolutePositionalEmbedding

    table = getattr(net, 'pos_emb', None)
    return table.max_seq_len if isinstance(table, AbsolutePositionalEmbedding) else None


def compile_refusals(net: nn.Module) -> list[str]:
    """Why a model cannot go on in memory of fixed shape, by name."""
    return list(dict.fromkeys(_refusals(net)))


def _refusals(net: nn.Module) -> Iterator[str]:
    from x_transformers.attention.attention import Attention
    from x_transformers.attention.hybrid import works_by_token
    from x_transformers.generation.keywords import reads_new_tokens
    from x_transformers.layers.slots import has_state

    if not reads_new_tokens(net):
        yield f'{type(net).__name__} does not read new tokens alone'
    if getattr(net, 'looped', False):
        yield 'looped, whose steps depend on the tokens'
    reasons: list[str] = getattr(net, 'why_no_cache', [])
    yield from reasons
    stack: Any = getattr(net, 'attn_layers', None)
    if any(has_state(layer.inside) for layer in getattr(stack, 'layers', ()) if hasattr(layer, 'inside')):
        yield 'mixer, whose state is no tape'
    for module in net.modules():
        if isinstance(module, Attention):
            yield from (f'attn_{name}' for name in module.why_no_cache)
            hybrid = module.hybrid_module
            if hybrid is not None and not works_by_token(hybrid):
                yield 'attn_hybrid_module, whose state is no tape'
    if not reasons and not getattr(net, 'can_cache_kv', False):
        yield f'{type(net).__name__} cannot cache keys and values'
