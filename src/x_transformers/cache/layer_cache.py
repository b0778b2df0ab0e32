"""The cache of one step of a stack: named buffers, and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from x_transformers.cache.cursor import Cursor
from x_transformers.cache.states import reordered_carry, without_history
from x_transformers.cache.tape import Tape, writes_in_place
from x_transformers.tensor_types import Int, Shaped


class LayerCache:
    """The named tapes of one execution step: 'k', 'v', 'latent', 'shift', 'forget', ...

    A new feature that needs state adds a tape under a name of its own and is rolled back, windowed and reordered for free.

    - ``tapes`` grow by one row per token, or are fixed (cross attention);
    - ``states`` are tensors, batch first, replaced at every step: reordered, but not rolled back;
    - ``carry`` holds anything else, such as a recurrent module's hidden state: its tensors are reordered, but not rolled back
      (``carry_axis`` may name their batch axis).
    """

    __slots__ = ('carry', 'carry_axis', 'cursor', 'states', 'tapes')

    def __init__(self, cursor: Cursor | None = None) -> None:
        self.cursor = cursor
        self.tapes: dict[str, Tape] = {}
        self.states: dict[str, Tensor] = {}
        self.carry: dict[str, Any] = {}
        self.carry_axis: dict[str, int] = {}

    @property
    def length(self) -> int:
        """Rows of the longest growing tape."""
        most = 0
        for tape in self.tapes.values():
            if tape.length > most and not tape.fixed:
                most = tape.length
        return most

    @property
    def can_rollback(self) -> bool:
        return not without_history(self.states, self.carry)

    def get(self, name: str) -> Tensor | None:
        """What is held under ``name``, in whole; None if there is nothing."""
        tape = self.tapes.get(name)
        return tape.value if tape is not None else self.states.get(name)

    def extend(self, **new: Shaped[Tensor, '... m d']) -> tuple[Tensor, ...]:
        """Append to each named tape, making those that are missing; the full values, in the order given."""
        tapes, whole, cursor = self.tapes, [], self.cursor
        in_place = writes_in_place()
        for name, rows in new.items():
            tape = tapes.get(name)
            if tape is None:
                if cursor is not None:
                    raise ValueError(
                        f'{name} must have a buffer in a cache of fixed capacity, got none. Make it of a cache whose tokens '
                        f'had {name}.'
                    )
                tape = Tape.of(rows)
            else:
                tape = tape.append(rows, None if cursor is None else cursor.row, in_place=in_place)
            tapes[name] = tape
            whole.append(tape.value)
        return tuple(whole)

    def newest(self, whole: Shaped[Tensor, '... n d'], before: int, new: int) -> Shaped[Tensor, '... m d']:
        """Of a tape's rows, which end with the ``new`` ones of this call: those and ``before`` rows before them.

        There are fewer if fewer have been seen; with a fixed capacity, zeros in their place.
        """
        if self.cursor is None:
            return whole[..., max(0, whole.shape[-2] - new - before) :, :]
        rows = self.cursor.rows(before, new)
        read = whole.index_select(-2, rows.clamp(min=0))
        return read if before == 0 else read.masked_fill((rows < 0).unsqueeze(-1), 0.0)

    def replace(self, **whole: Shaped[Tensor, '... n d']) -> None:
        """Exchange the whole contents of growing tapes."""
        for name, rows in whole.items():
            fixed = name in self.tapes and self.tapes[name].fixed
            self.tapes[name] = Tape.of(rows, fixed=fixed)

    def keep(self, name: str, tensor: Shaped[Tensor, '...']) -> None:
        """Hold one tensor, batch first, in place of the one held before. It cannot be rolled back."""
        self.states[name] = tensor

    def fixed(self, name: str, tensor: Shaped[Tensor, '... n d']) -> None:
        """Hold a tensor that belongs to the context rather than to the tokens: it neither grows nor shrinks."""
        self.tapes[name] = Tape.of(tensor, fixed=True)

    def fork(self) -> LayerCache:
        """A snapshot that can be continued independently; tapes are shared until one of the two is written."""
        # without its constructor, which would be called for every layer and token
        twin = LayerCache.__new__(LayerCache)
        twin.cursor, twin.tapes = self.cursor, self.tapes.copy()
        twin.states = self.states.copy() if self.states else {}
        twin.carry = self.carry.copy() if self.carry else {}
        twin.carry_axis = self.carry_axis.copy() if self.carry_axis else {}
        return twin

    def changed(self, change: Callable[[Tape], Tape]) -> LayerCache:
        """A fork whose tapes went through ``change``."""
        twin = self.fork()
        twin.tapes = {name: change(tape) for name, tape in self.tapes.items()}
        return twin

    def shortened(self, removed: int, cut: Callable[[Tape], Tape]) -> LayerCache:
        """A fork without the newest ``removed`` rows of each growing tape, which ``cut`` takes off."""
        if removed and not self.can_rollback:
            held = ', '.join(without_history(self.states, self.carry))
            raise ValueError(
                f'cache must hold rows alone to be rolled back, got a state without history ({held}). Keep a fork() from '
                'before instead.'
            )
        return self.changed(cut)

    def reordered(
        self, index: Int[Tensor, ' r'], gathered: Callable[[Tape], Tape] | None = None, batch: int | None = None
    ) -> LayerCache:
        """A fork with these batch rows; ``gathered`` takes them of a tape."""
        batch = next((tape.batch for tape in self.tapes.values()), batch)
        twin = self.changed((lambda tape: tape.rows(index)) if gathered is None else gathered)
        twin.states = {name: state.index_select(0, index) for name, state in self.states.items()}
        twin.carry = reordered_carry(self.carry, self.carry_axis, index, batch)
        return twin

    def __repr__(self) -> str:
        return f'LayerCache({self.tapes}, states={list(self.states)}, carry={list(self.carry)})'
