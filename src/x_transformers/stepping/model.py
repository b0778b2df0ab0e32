"""A model that reads one token at a time: embedding, stack, logits."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.call import Call
from x_transformers.position.relative import RelativeBias
from x_transformers.stepping.one_row import OneRow
from x_transformers.stepping.place import AnyRow, NextRow
from x_transformers.stepping.stack import StackStep
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.cache.kv_cache import KVCache
    from x_transformers.stepping.place import Place
    from x_transformers.transformer_wrapper import TransformerWrapper

# positions that are looked up at a time
AHEAD = 64
# memory of fixed shape comes in multiples of so many rows, so that texts of about the same length share a program
ROWS = 64


class TokenReader:
    """A model that goes on where a cache ends, one token per call. It has memory of its own; the cache is left as it was.

    Args:
        room: about how many tokens will follow.
        limit: how many tokens are visible at most, the newest included.
        start: how many tokens of each row are padding on the left.
    """

    # whether it is used for other texts later, when weights may have changed
    lasting = False

    def __init__(
        self,
        net: TransformerWrapper,
        cache: KVCache,
        *,
        room: int,
        limit: int | None = None,
        start: Int[Tensor, ' b'] | None = None,
        context_mask: Bool[Tensor, 'b j'] | None = None,
    ) -> None:
        self.net: Any = net
        self.start = start
        self.stack = StackStep(net.attn_layers, cache, cache.retained + room, context_mask, self.lasting)
        self.at = cache.length
        self.geometry = geometry(self.stack, cache, limit) | {'padding': padding_of(cache, start)}
        self.head = net.to_logits if net.linear_head is not None else None
        self.enters = [part for part in (net.post_emb_norm, net.project_emb) if not isinstance(part, nn.Identity)]

    def read(self, ids: Int[Tensor, 'b 1']) -> Float[Tensor, 'b 1 v']:
        """What comes after this token, which is the next one."""
        raise NotImplementedError

    def _through(self, x: Float[Tensor, 'b 1 e'], place: Place) -> Float[Tensor, 'b 1 v']:
        """From the token's embedding to its logits."""
        for part in self.enters:
            x = part(x)
        h = self.stack(x, place)
        logits: Tensor = self.net._logits(h, Call(x=h), whole=False)[0] if self.head is None else self.head(h)
        return logits


class Stepper(TokenReader):
    """Reads as it goes: its memory grows, and what is looked at is cut out of it."""

    def __init__(self, net: TransformerWrapper, cache: KVCache, **beginning: Any) -> None:
        super().__init__(net, cache, **beginning)
        self.place = NextRow(**self.geometry)
        self._positions: Tensor | None = None
        self._positions_from = 0

    def read(self, ids: Int[Tensor, 'b 1']) -> Float[Tensor, 'b 1 v']:
        place, stack = self.place, self.stack
        place.move(self.at)
        if place.row >= stack.rows:
            stack.widen(2 * stack.rows)
        if stack.stack.rel_pos is not None:
            place.bias = RelativeBias(stack.stack.rel_pos)
        x = self.net.token_emb(ids)
        if self.net.has_absolute_positions:
            x = x + self._position(ids)
        self.at += 1
        return self._through(x, place)

    def _position(self, ids: Int[Tensor, 'b 1']) -> Float[Tensor, '#b 1 d']:
        """Absolute positions, looked up for many tokens at once unless each row has its own."""
        net = self.net
        if self.start is not None:
            own: Tensor = net.pos_emb(ids, seq_start_pos=self.start, offset=self.at)
            return own
        table = self._positions
        if table is None or self.at - self._positions_from >= table.shape[0]:
            self._positions_from = self.at
            ahead = min(AHEAD, max(1, net.max_seq_len - self.at))
            self._positions = table = net.pos_emb(ids[:1].expand(1, ahead), offset=self.at)
        return table.narrow(0, self.at - self._positions_from, 1)


class CompiledStepper(TokenReader):
    """One compiled program: its memory keeps its shape, and what is not yet written is masked.

    ``begin`` puts another text into the same memory, for which nothing is compiled anew.
    """

    lasting = True
    # who reads with it now
    reader: weakref.ref[object] | None = None

    def __init__(self, net: TransformerWrapper, cache: KVCache, **beginning: Any) -> None:
        super().__init__(net, cache, **beginning)
        device = next(net.parameters()).device
        self.place = AnyRow(self.stack.rows, device, **self.geometry)
        self._table: Tensor | None = None
        options: dict[str, Any] | None = {'cpp_wrapper': True} if device.type == 'cpu' else None
        self.program = torch.compile(own_copy(self._step), fullgraph=True, dynamic=False, options=options)
        self.begin(cache, self.start)

    def begin(self, cache: KVCache, start: Int[Tensor, ' b'] | None) -> None:
        """Go on where another cache ends, of no more tokens than there are rows."""
        self.start, self.at = start, cache.length
        self._checked = False
        self.stack.take(cache)
        self.place.begin(cache.length - cache.retained, padding_of(cache, start))
        if self.net.has_absolute_positions:
            made = self._positions_of_rows(len(self.place.rows) - self.place.front)
            if self._table is None:
                self._table = made.clone()
            self._table.copy_(made)

    def is_read(self) -> bool:
        return self.reader is not None and self.reader() is not None

    def _positions_of_rows(self, rows: int) -> Float[Tensor, '#b r d']:
        net = self.net
        known = min(rows, net.max_seq_len - self.place.base)
        batch = 1 if self.start is None else self.start.shape[0]
        ids = torch.zeros(batch, known, dtype=torch.long, device=self.place.rows.device)
        made: Tensor = net.pos_emb(ids, seq_start_pos=self.start, offset=self.place.base)
        return F.pad(made if made.ndim == 3 else made[None], (0, 0, 0, rows - known))

    def read(self, ids: Int[Tensor, 'b 1']) -> Float[Tensor, 'b 1 v']:
        row = self.place.rows.narrow(0, self.at - self.place.base, 1).clone()
        self.at += 1
        # whether the model is still what was compiled is asked once for each text
        known, self._checked = self._checked, True
        stance: Any = torch.compiler.set_stance(skip_guard_eval_unsafe=True) if known else nullcontext()
        with stance:
            logits: Tensor = self.program(ids, row)  # type: ignore[no-untyped-call]
        return logits

    def _step(self, ids: Int[Tensor, 'b 1'], row: Int[Tensor, ' 1']) -> Float[Tensor, 'b 1 v']:
        place = self.place
        place.move(row)
        x = self.net.token_emb(ids)
        if self._table is not None:
            x = x + self._table.index_select(1, row)
        with OneRow():
            logits = self._through(x, place)
        place.leave()
        return logits


class Programs:
    """The compiled steppers of a model, by the shapes that they are for: the newest are kept, as compiling takes its time."""

    KEPT = 4

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], CompiledStepper] = {}

    def stepper(
        self,
        net: TransformerWrapper,
        cache: KVCache,
        *,
        room: int,
        limit: int | None,
        start: Int[Tensor, ' b'] | None,
        reader: object,
    ) -> CompiledStepper:
        """One that goes on where the cache ends, compiled anew only for a new batch size or for longer texts.

        It belongs to ``reader`` for as long as that one is there: texts that are written at the same time have one each.
        """
        rows = -(-(cache.retained + room) // ROWS) * ROWS
        weight = next(net.parameters())
        batch = next(tape.batch for layer in cache for tape in layer.tapes.values())
        # memory that was made in inference mode cannot be written outside of it
        inference = torch.is_inference_mode_enabled()
        key = (id(net), batch, rows, limit, start is None, weight.dtype, weight.device, inference)
        stepper = self.kept.pop(key, None)
        if stepper is None or stepper.is_read():
            stepper = CompiledStepper(net, cache, room=rows - cache.retained, limit=limit, start=start)
        else:
            stepper.begin(cache, start)
        stepper.reader = weakref.ref(reader)
        self.kept[key] = stepper
        while len(self.kept) > self.KEPT:
            del self.kept[next(iter(self.kept))]
        return stepper


def own_copy(method: Any) -> Any:
    """The same method with a code object of its own, by which the compiler keeps its programs: few for each."""
    function = method.__func__
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return MethodType(twin, method.__self__)


def geometry(stack: StackStep, cache: KVCache, limit: int | None) -> dict[str, Any]:
    """What a place must know of the model and of the beginning."""
    first = stack.attentions[0]
    reaches = [past for past in (first.attn.max_attend_past, None if limit is None else limit - 1) if past is not None]
    return {
        'front': first.front,
        'base': cache.length - cache.retained,
        'past': min(reaches, default=None),
        'rotary': stack.stack.rotary_pos_emb if first.rotates else None,
        'dim_head': first.attn.dim_head,
    }


def padding_of(cache: KVCache, start: Int[Tensor, ' b'] | None) -> Bool[Tensor, 'b p'] | None:
    """Which tokens of the cache are padding."""
    if start is None:
        return None
    places = torch.arange(cache.length - cache.retained, cache.length, device=start.device)
    return places < start.unsqueeze(-1)
