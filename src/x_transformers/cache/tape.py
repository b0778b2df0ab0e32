"""A buffer that grows along the sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from x_transformers.tensor_types import Int, Shaped

LEAST_ROOM = 64


def writes_in_place() -> bool:
    """Whether memory that tapes share may be written: not where gradients are recorded.

    Nor is a compiler shown such memory: who may write where is not a question about tensors.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class Room:
    """Memory that several tapes may share; ``used`` is where the newest of them ends."""

    __slots__ = ('buffer', 'used')

    def __init__(self, buffer: Shaped[Tensor, '... n c'], used: int) -> None:
        self.buffer = buffer
        self.used = used

    def has_space(self, end: int, more: int) -> bool:
        """Whether ``more`` rows may be written at ``end`` without harming anyone's view."""
        if end != self.used or end + more > self.buffer.shape[-2]:
            return False
        # memory made in inference mode cannot be written outside of it
        return not self.buffer.is_inference() or torch.is_inference_mode_enabled()


class Tape:
    """A tensor (..., n, d), batch first, that grows along axis -2 at amortized constant cost.

    A tape is a value: every method returns a new tape and the old one stays valid, so a past can be continued twice.
    Memory is shared as long as that is safe: ``append`` writes behind the last row if this tape is the newest view of its
    memory and copies otherwise. With gradients enabled it concatenates, since writing in place would break autograd.
    A ``fixed`` tape (the keys of cross attention) refuses to grow and is left alone by ``cut`` and ``last``.
    """

    __slots__ = ('_room', '_start', 'fixed', 'length', 'reserve')

    def __init__(self, room: Room, start: int, length: int, fixed: bool = False, reserve: int = 0) -> None:
        self._room = room
        self._start = start
        self.length = length
        self.fixed = fixed
        self.reserve = reserve

    @classmethod
    def of(cls, tensor: Shaped[Tensor, '... n c'], fixed: bool = False, reserve: int = 0) -> Tape:
        """A tape that holds ``tensor`` itself: no copy, no spare room until the first append.

        ``reserve``: how many more rows are expected, which the first append makes room for.
        """
        length = tensor.shape[-2]
        return cls(Room(tensor, length), 0, length, fixed, reserve)

    @property
    def value(self) -> Tensor:
        buffer = self._room.buffer
        if self.length == buffer.shape[-2]:
            return buffer
        return buffer[..., self._start : self._start + self.length, :]

    @property
    def batch(self) -> int:
        return self._room.buffer.shape[0]

    def nbytes(self) -> int:
        """Bytes of the rows that are held, without spare room."""
        value = self.value
        return value.numel() * value.element_size()

    def append(
        self, new: Shaped[Tensor, '... n c'], at: Int[Tensor, ' 1'] | None = None, *, in_place: bool | None = None
    ) -> Tape:
        """This tape with ``new`` behind it. ``at`` is for tapes whose end is a tensor (``FixedTape``).

        ``in_place``: what ``writes_in_place`` says, from those who have asked already.
        """
        room, buffer = self._room, self._room.buffer
        if self.fixed:
            raise ValueError('the keys of a context must stay as they are, got new rows. Replace them instead.')
        if new.shape[:-2] != buffer.shape[:-2] or new.shape[-1] != buffer.shape[-1]:
            raise ValueError(
                f'new rows must agree with those of the cache in batch, heads and features, {_but_length(buffer)}, got '
                f'{_but_length(new)}. Use the cache with the batch that it was made for, or reorder its rows.'
            )
        in_place = writes_in_place() if in_place is None else in_place
        if not in_place or new.dtype != buffer.dtype:
            return Tape.of(torch.cat((self.value, new), dim=-2), reserve=self.reserve)
        more = new.shape[-2]
        end = self._start + self.length
        if not room.has_space(end, more):
            return self._moved(more).append(new)
        buffer[..., end : end + more, :] = new
        room.used = end + more
        return Tape(room, self._start, self.length + more, False, self.reserve - more if self.reserve > more else 0)

    def _moved(self, more: int) -> Tape:
        """A copy of this tape with room for at least ``more`` rows."""
        value = self.value
        spare = max(more, self.reserve, self.length // 2, LEAST_ROOM)
        buffer = value.new_empty((*value.shape[:-2], self.length + spare, value.shape[-1]))
        buffer.narrow(-2, 0, self.length).copy_(value)
        return Tape(Room(buffer, self.length), 0, self.length, reserve=self.reserve)

    def cut(self, length: int, own: bool = False) -> Tape:
        """The oldest ``length`` rows, as if the others had never been appended.

        ``own``: nobody else holds a tape of this memory, so the next append may overwrite what was cut off.
        """
        if self.fixed:
            return self
        if not 0 <= length <= self.length:
            raise ValueError(f'length must lie in 0 to {self.length}, the rows that there are, got {length}. Cut fewer.')
        if own and self._room.used == self._start + self.length and self._room.buffer.shape[-2] > self.length:
            self._room.used = self._start + length
        return Tape(self._room, self._start, length, reserve=self.reserve)

    def last(self, n: int) -> Tape:
        """The newest ``n`` rows (all, if there are fewer)."""
        if self.fixed or n >= self.length:
            return self
        if n < 0:
            raise ValueError(f'n must be at least 0, got {n}. Keep some rows, or none.')
        return Tape(self._room, self._start + self.length - n, n, reserve=self.reserve)

    def rows(self, index: Int[Tensor, ' r']) -> Tape:
        """Batch rows gathered by ``index``: a permutation, a repetition, a choice. Spare room is kept."""
        room = Room(self._room.buffer.index_select(0, index), self._start + self.length)
        return Tape(room, self._start, self.length, self.fixed, self.reserve)

    def reserved(self, more: int) -> Tape:
        """The same tape, told that ``more`` rows will follow; nothing is allocated yet."""
        return Tape(self._room, self._start, self.length, self.fixed, more)

    def __repr__(self) -> str:
        kind = 'fixed tape' if self.fixed else 'tape'
        return f'<{kind} of {self.length} rows {_but_length(self._room.buffer)}>'


def keep_sharing(change: Callable[[Tape], Tape]) -> Callable[[Tape], Tape]:
    """The same change, made once of a tape that layers share, so that they go on sharing it."""
    changed: dict[int, Tape] = {}

    def change_once(tape: Tape) -> Tape:
        if id(tape) not in changed:
            changed[id(tape)] = change(tape)
        return changed[id(tape)]

    return change_once


class FixedTape(Tape):
    """A tape of fixed shape (..., capacity, d): its value is the whole buffer, whatever has been written.

    ``append`` writes in place, from row ``at`` on, which is a tensor: nothing about the tape changes from token to token that a
    compiled program or a recorded CUDA graph would have to be made anew for. Rows that were never written are zeros.
    """

    __slots__ = ()

    def __init__(self, buffer: Shaped[Tensor, '... n c']) -> None:
        super().__init__(Room(buffer, buffer.shape[-2]), 0, buffer.shape[-2])

    @classmethod
    def of_tape(cls, tape: Tape, held: int, capacity: int) -> Tape:
        """A copy of a tape's first ``held`` rows in front of zeros, ``capacity`` rows in all; a tape that is fixed stays."""
        if tape.fixed:
            return tape
        value = tape.value
        buffer = value.new_zeros((*value.shape[:-2], capacity, value.shape[-1]))
        buffer.narrow(-2, 0, held).copy_(value[..., :held, :])
        return cls(buffer)

    def append(
        self, new: Shaped[Tensor, '... n c'], at: Int[Tensor, ' 1'] | None = None, *, in_place: bool | None = None
    ) -> FixedTape:
        buffer = self._room.buffer
        if at is None:
            raise ValueError('a tape of fixed shape must be told where to write')
        if new.requires_grad:
            raise ValueError(
                'gradients must be off with a cache of fixed capacity, which is written in place. Call it under '
                'torch.no_grad().'
            )
        rows = at if new.shape[-2] == 1 else at + torch.arange(new.shape[-2], device=at.device)
        buffer.index_copy_(buffer.ndim - 2, rows, new if new.dtype == buffer.dtype else new.to(buffer.dtype))
        return self

    def rows(self, index: Int[Tensor, ' r']) -> FixedTape:
        return FixedTape(self._room.buffer.index_select(0, index))

    def cut(self, length: int, own: bool = False) -> FixedTape:
        """The same memory: who may see how much of it is said by the cache's cursor."""
        return self

    def last(self, n: int) -> FixedTape:
        raise ValueError(
            'a cache of fixed capacity must get its window when it is made. Call KVCache.fixed(capacity, reach=...).'
        )


def _but_length(t: Shaped[Tensor, '... n c']) -> str:
    return f'({", ".join(map(str, t.shape[:-2]))}, n, {t.shape[-1]})'
