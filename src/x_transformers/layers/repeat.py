"""Blocks that a call runs several times, and functions applied to their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from x_transformers.layers.plan import LayerPlan, Step
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags


def repeated_steps(flags: StackFlags, plan: LayerPlan, repeats: Any, order: Sequence[int] | None) -> tuple[Step, ...]:
    """The steps of a call whose blocks run as often as ``repeats`` says, https://dnhkng.github.io/posts/rys/.

    Raises ValueError if the stack has no such blocks.
    """
    for name in flags.having('no_blocks'):
        if getattr(flags, name) or (name == 'layers_execute_order' and order is not None):
            raise ValueError(f'repeat_blocks must be left out with {name}, where there are no blocks in their own order.')
    count = len(plan.order) // plan.block_size
    one = isinstance(repeats, Sequence) and len(repeats) == 2 and isinstance(repeats[1], int)
    spans: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for pair in [repeats] if one else repeats if isinstance(repeats, Sequence) else [repeats]:
        first, last, times = checked_repeat(pair, count)
        if taken & {*range(first, last + 1)}:
            raise ValueError(f'repeat_blocks must name each block at most once, got {repeats!r}.')
        taken |= {*range(first, last + 1)}
        spans[first] = last, times
    blocks: list[int] = []
    block = 0
    while block < count:
        last, times = spans.get(block, (block, 1))
        blocks += [*range(block, last + 1)] * times
        block = last + 1
    return plan.repeated(blocks)


def checked_repeat(pair: Any, count: int) -> tuple[int, int, int]:
    """(first block, last block, how often) from ``(block, times)`` or ``((first, last), times)``."""
    if isinstance(pair, Sequence) and len(pair) == 2:
        span, times = pair
        ends = (span, span) if isinstance(span, int) else tuple(span) if isinstance(span, Sequence) else ()
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (*ends, times))
        if len(ends) == 2 and whole and 0 <= ends[0] <= ends[1] < count and times >= 1:
            return ends[0], ends[1], times
    raise ValueError(
        f'repeat_blocks must be (block, times), ((first, last), times) or a tuple of those, with blocks 0 to {count - 1} and '
        f'times from 1, got {pair!r}.'
    )


def block_transform(changes_of_blocks: Any) -> Callable[[int, Tensor], Tensor] | None:
    """What the caller does to the inputs of blocks, as one function of a block's number and its input."""
    if changes_of_blocks is None:
        return None
    if callable(changes_of_blocks):
        return partial(changed, changes_of_blocks)
    fits = isinstance(changes_of_blocks, Mapping) and all(
        isinstance(block, int) and block >= 1 and callable(change) for block, change in changes_of_blocks.items()
    )
    if not fits:
        raise TypeError(
            'transform_block_inputs must be a function (block, x), or a dictionary from blocks, counted from 1, to functions '
            f'of x, got {changes_of_blocks!r}.'
        )
    changes: Mapping[int, Callable[[Tensor], Tensor]] = changes_of_blocks
    return lambda block, x: changed(lambda _, x: changes[block](x), block, x) if block in changes else x


def changed(
    change: Callable[[int, Float[Tensor, '... n d']], Any], block: int, x: Float[Tensor, '... n d']
) -> Float[Tensor, '... n d']:
    """What a caller makes of the input of a block, which must fit in its place."""
    out = change(block, x)
    check_in_place('transform_block_inputs', out, x)
    fitting: Tensor = out
    return fitting


def check_in_place(name: str, out: Any, x: Float[Tensor, '... n d']) -> None:
    """Raise ValueError unless a function of the caller's gave a tensor of its input's shape."""
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f'{name} must give a tensor of the shape of its input, {tuple(x.shape)}, got {got}.')


def later_blocks(
    change: Callable[[int, Float[Tensor, '... n d']], Float[Tensor, '... n d']], block: int, x: Float[Tensor, '... n d']
) -> Tensor:
    """``change`` for all blocks but the first, whose input a model changes before it reaches the stack."""
    return change(block, x) if block > 1 else x
