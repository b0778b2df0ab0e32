"""The decode loop: a net reads tokens and the next ones are chosen, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates, with_cache
from x_transformers.cache.kv_cache import KVCache
from x_transformers.generation.keywords import NetKeywords, reads_new_tokens
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import GenerateError
from x_transformers.tensor_types import Float, Int, Shaped

if TYPE_CHECKING:
    from x_transformers.generation.continuation import Continuation, Programs

# how many tokens are expected where nobody says
EXPECTED = 64

__all__ = ['Reader', 'Tokens', 'decode', 'evaluating', 'modify_cached_kv', 'reader_for', 'reads_new_tokens']

Pick = Callable[[Tensor], Tensor]


def modify_cached_kv(
    cache: LayerIntermediates, fn: Callable[[Float[Tensor, 'b ... j d']], Float[Tensor, 'b ... j d']], kinds: str = 'a'
) -> None:
    """Apply ``fn`` to both cached tensors of every self attention, in place of the old ones.

    What else a cache of this library remembers stays as it is; ``KVCache.window`` and ``reorder`` change all of it alike.
    """
    for inter in cache.attn_intermediates or []:
        if (inter.layer_type or '-') in kinds and inter.cached_kv is not None:
            first, second = inter.cached_kv
            inter.cached_kv = (fn(first), None if second is None else fn(second))


def last_rows_of(cache: LayerIntermediates, room: int) -> LayerIntermediates:
    """The newest ``room`` rows of what a net by the original's contract returned; of ours all that it remembers is cut."""
    held = cache.kv_cache
    if not isinstance(held, KVCache):
        modify_cached_kv(cache, lambda t: t[..., max(t.shape[-2] - room, 0) :, :])
        return cache
    held = held.window(room)
    # such a net is told of padding from the window's beginning on
    return with_cache(cache, held if held.front else held.begun())


class Tokens:
    """A batch of sequences in memory that is taken in advance.

    Tokens are ids (b n) or, for nets that read numbers, vectors (b n d).
    """

    def __init__(self, start: Shaped[Tensor, 'b n ...'], room: int = EXPECTED) -> None:
        self.length = start.shape[1]
        self._data = start.new_empty((start.shape[0], self.length + room, *start.shape[2:]))
        self._data[:, : self.length] = start

    @property
    def value(self) -> Tensor:
        return self._data[:, : self.length]

    @property
    def batch(self) -> int:
        return self._data.shape[0]

    def part(self, low: int, high: int | None = None) -> Tensor:
        return self._data[:, low : self.length if high is None else high]

    def append(self, new: Shaped[Tensor, 'b ...']) -> None:
        """One token per row (b ...), or several with ``extend``."""
        self.extend(new.unsqueeze(1))

    def extend(self, new: Shaped[Tensor, 'b n ...']) -> None:
        end = self.length + new.shape[1]
        if torch.is_grad_enabled() and (new.requires_grad or self._data.requires_grad):
            # what has been read is part of a graph, where nothing may be overwritten
            self._data, self.length = torch.cat((self.value, new), dim=1), end
            return
        if end > self._data.shape[1]:
            wider = self._data.new_empty((self.batch, 2 * end, *self._data.shape[2:]))
            wider[:, : self.length] = self.value
            self._data = wider
        self._data[:, self.length : end] = new
        self.length = end

    def cut(self, length: int) -> None:
        self.length = min(self.length, length)

    def reorder(self, index: Int[Tensor, ' r']) -> None:
        self._data = self._data.index_select(0, index)


def no_program(reasons: Iterable[str]) -> GenerateError:
    return GenerateError(f'compile=True is not available with: {"; ".join(reasons)}. Leave it out.')


class Reader:
    """One net that reads a growing sequence and says what it expects next.

    A net that ``reads_new_tokens``, as ours do, is fed only what it has not seen, and computes only the logits asked for.
    Any other net is given the whole visible window and the intermediates of the call before:
    ``net(x, return_intermediates=True, cache=...) -> (logits, intermediates)``.

    Args:
        cache: remember keys and values, if the net can.
        window: show only the last ``net.max_seq_len`` tokens.
        start: pads in front of each row; ``most_pads`` is the largest of them.
        expected: about how many tokens will follow, to make room for them once.
        origin: the first token that this reader reads.
        programs: compiled continuations, one of which takes over behind the first call; every call adds one token then.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        cache: bool = True,
        window: bool = True,
        start: Int[Tensor, ' b'] | None = None,
        most_pads: int = 0,
        keywords: NetKeywords | None = None,
        expected: int = 0,
        origin: int = 0,
        programs: Programs | None = None,
    ) -> None:
        self.net = net
        self.own_net = reads_new_tokens(net)
        self.caching = cache and bool(getattr(net, 'can_cache_kv', False))
        limit = int(getattr(net, 'max_seq_len', 0) or 0)
        self.limit = limit if window and limit > 0 else None
        self.start = start
        self.most_pads = most_pads
        self.keywords = keywords if keywords is not None else NetKeywords({}, 0, None)
        self.expected = expected
        self.origin = origin
        self.seen = origin
        self.cache: Any = None
        # what the net reported last, if somebody wants it
        self.keeps_intermediates = False
        self.intermediates: Any = None
        # what its heads for later tokens say, if somebody wants it, from this position on
        self.keeps_later = False
        self.later: tuple[Float[Tensor, 'b k v'], ...] = ()
        self.later_from = origin
        self.programs = programs
        self.continuation: Continuation | None = None
        self._skipped = 0

    def check_length(self, total: int, name: str = 'the net') -> None:
        """Refuse to feed ``total`` tokens to a net whose cache does not reach that far."""
        outside = getattr(self.net, 'can_cache_kv_outside_max_seq_len', True)
        if self.caching and self.limit is not None and total > self.limit and not outside:
            raise GenerateError(
                f'The sequence must have at most max_seq_len={self.limit} tokens with a cache, got {total}: {name} cannot use '
                'cached keys and values beyond that, most likely because it has absolute positions. Use rotary positions, '
                'a shorter sequence, or cache_kv=False.'
            )

    def read(self, tokens: Tokens, last: int = 1) -> Float[Tensor, 'b k v']:
        """What the net expects after each of the ``last`` newest tokens."""
        if self.continuation is not None:
            return self._read_on(self.continuation, tokens)
        if self.caching and self.own_net:
            return self._read_new(tokens, last)
        return self._read_window(tokens, last)

    def _read_new(self, tokens: Tokens, last: int) -> Tensor:
        cache: KVCache | None = self.cache
        low, high = self.seen, tokens.length
        # behind nothing but embeddings, what the last of these says is what comes first
        if last > high - low and not (cache is None and high == low):
            raise ValueError(
                f'last must be at most {high - low}, the tokens that have not been read, got {last}. Ask for the others '
                'earlier.'
            )
        if cache is None:
            low = self._window_from(high)
            self._skipped = low - self.origin
            keywords = self.keywords.whole(low, high)
        else:
            held, new = cache.retained, high - low
            if self.limit is not None and held + new > self.limit + cache.front:
                cache = cache.window(self.limit + cache.front - new)
                held = cache.retained
            keywords = self.keywords.continued(low, high, held + new, cache.front)
            keywords['cache'] = cache
        keywords.update(self._start_of(cache))
        out, intermediates = self.net(
            tokens.part(low, high),
            return_intermediates=True if self.keeps_intermediates else 'cache',
            input_not_include_cache=True,
            logits_last=last,
            **keywords,
            **self._asks(),
        )
        out = self._without_later(out, high, last)
        cached = KVCache.of(intermediates)
        if self.keeps_intermediates:
            self.intermediates = intermediates
        self.cache = cached.reserve(self._room()) if cache is None and cached is not None else cached
        self.seen = high
        if self.programs is not None and cache is None and cached is not None:
            # a token sees what the window would show, if the text is longer than that
            reach = None if self.limit is None or high + self.expected <= self.limit else self.limit + cached.front
            self.continuation = self.programs.continuation(self.net, cached, expected=self.expected, reach=reach, reader=self)
            self.cache = None
        return self._newest(out, last)

    def _read_on(self, continuation: Continuation, tokens: Tokens) -> Tensor:
        low, high = self.seen, tokens.length
        dropped = continuation.seen - continuation.length
        front = continuation.cache.front
        first = self.origin + self._skipped + max(dropped - front, 0)
        keywords = self.keywords.fixed(low, high, first, continuation.capacity - continuation.cache.front_held)
        keywords.update(self._start(self._skipped))
        logits = continuation.read(tokens.part(low, high), **keywords)
        self.seen = high
        return self._newest(logits, 1)

    def _read_window(self, tokens: Tokens, last: int) -> Tensor:
        low, high = self._window_from(tokens.length), tokens.length
        keywords = self.keywords.whole(low, high)
        keywords.update(self._start(low - self.origin), **self._asks())
        x = tokens.part(low, high)
        if self.own_net and not self.keeps_intermediates:
            return self._newest(self._without_later(self.net(x, logits_last=last, **keywords), high, last), last)
        if self.own_net:
            out, self.intermediates = self.net(x, logits_last=last, return_intermediates=True, **keywords)
            return self._newest(self._without_later(out, high, last), last)
        # by contract such a net processes one new token when it is given a cache
        cache = self.cache if self.caching and high - self.seen == 1 and last == 1 else None
        if cache is not None and self.limit is not None:
            cache = last_rows_of(cache, self.limit - 1)
        out, intermediates = self.net(x, return_intermediates=True, cache=cache, **keywords)
        self.cache = intermediates if self.caching else None
        self.intermediates = intermediates if self.keeps_intermediates else None
        self.seen = high
        return self._newest(out, last)

    def _asks(self) -> dict[str, bool]:
        return {'return_multi_token_logits': True} if self.keeps_later else {}

    def _without_later(self, out: Any, high: int, last: int) -> Any:
        """What the net expects next; what it expects behind that is kept."""
        if self.keeps_later:
            out, *later = out
            self.later, self.later_from = tuple(later), high - last
        return out

    def _window_from(self, high: int) -> int:
        return self.origin if self.limit is None else max(self.origin, high - self.limit)

    def _room(self) -> int:
        return self.expected if self.limit is None else min(self.expected, self.limit)

    def _start_of(self, cache: KVCache | None) -> dict[str, Tensor]:
        """The pads as counted from the first row that the cache has ever seen; nothing once they have left the window."""
        if self.start is None:
            return {}
        gone = 0 if cache is None or cache.front else cache.length - cache.retained
        return {} if self._skipped + gone >= self.most_pads else self._start(self._skipped)

    def _start(self, dropped: int) -> dict[str, Tensor]:
        """The pads that are still in sight after ``dropped`` rows have left on the left."""
        if self.start is None or dropped >= self.most_pads:
            return {}
        return {'seq_start_pos': (self.start - dropped).clamp(min=0) if dropped else self.start}

    def _newest(self, out: Any, last: int) -> Tensor:
        if not isinstance(out, Tensor):
            raise GenerateError('net must return one tensor of logits, got several. Build it with num_output_heads=1.')
        return out[..., -last:, :]

    # ------------------------------------------------------------ going back, choosing rows

    def mark(self) -> tuple[Any, int]:
        """Where the reader is now; ``rollback`` may need it."""
        return self.cache, self.seen

    def rollback(self, length: int, mark: tuple[Any, int]) -> None:
        """Forget everything after ``length`` tokens. ``mark`` was taken when no more than that had been read."""
        if self.seen <= length or self.cache is None:
            return
        if not isinstance(self.cache, KVCache):
            self.cache, self.seen = None, self.origin
        elif self.cache.can_rollback:
            self.cache = self.cache.rollback(self.cache.length - (self.seen - length), own=True)
            self.seen = length
        else:
            # a state without history: go back to the mark and read what was accepted once more
            self.cache, self.seen = mark

    def reorder(self, index: Int[Tensor, ' r'], repeated_from: int | None = None) -> None:
        """Continue with batch rows ``index``. ``repeated_from``: the batch changes size; all that belongs to it follows."""
        if isinstance(self.cache, KVCache):
            self.cache = self.cache.reorder(index, context=repeated_from is not None)
        elif isinstance(held := getattr(self.cache, 'kv_cache', None), KVCache):
            self.cache = with_cache(self.cache, held.reorder(index, context=repeated_from is not None))
        elif self.cache is not None:
            modify_cached_kv(self.cache, lambda t: t.index_select(0, index), kinds='ac')
        if repeated_from is not None:
            self.keywords = self.keywords.rows(index, repeated_from)
            self.start = self.start if self.start is None else self.start.index_select(0, index)


@torch.no_grad()
def decode(
    reader: Any,
    tokens: Tokens,
    steps: int | None,
    pick: Pick,
    eos: int | None = None,
    pad: int = 0,
    check: Callable[[int], None] | None = None,
) -> Iterator[Int[Tensor, ' b']]:
    """Read, pick, append, yield: ``steps`` times, or until every row has produced ``eos``.

    After its ``eos`` a row yields ``pad``. ``reader`` is anything with ``read(tokens)``; ``check`` is told before each step how
    many tokens will be fed.
    """
    finished = torch.zeros(tokens.batch, dtype=torch.bool, device=tokens.value.device)
    done = 0
    while steps is None or done < steps:
        if check is not None:
            check(tokens.length)
        chosen = pick(reader.read(tokens)[:, -1])
        if eos is not None:
            chosen = chosen.masked_fill(finished, pad)
            finished = finished | ((chosen == eos) & ~finished)
        tokens.append(chosen)
        done += 1
        yield chosen
        if eos is not None and bool(finished.all()):
            return


def reader_for(
    net: nn.Module,
    keywords: Mapping[str, Any],
    *,
    prompt: Any,
    steps: int | None,
    cache: bool,
    window: bool,
    programs: Programs | None = None,
) -> Reader:
    """A reader of ``prompt`` (a ``Prompt``) that expects ``steps`` tokens to be generated."""
    length = prompt.tokens.shape[1]
    total = None if steps is None else max(length + steps - 1, length)
    return Reader(
        net,
        cache=cache,
        window=window,
        start=prompt.start,
        most_pads=prompt.most_pads,
        keywords=NetKeywords(keywords, length, total),
        expected=EXPECTED if steps is None else steps,
        programs=programs,
    )
