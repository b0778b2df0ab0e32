"""Rules between a model's flags and those of its stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from x_transformers.flags.norms import ADAPTIVE
from x_transformers.flags.rule import Rule
from x_transformers.flags.stack import StackFlags

if TYPE_CHECKING:
    from x_transformers.flags.vision import VisionFlags


class OnStack:
    """A model's flags together with those of its stack, for rules about both.

    ``left_to_right``: no token sees a later one, but for the prefix of a prefix decoder.
    """

    def __init__(self, flags: Any, stack: Any, left_to_right: bool = False) -> None:
        self.own, self.stack = flags, stack
        self.left_to_right = left_to_right or stack.causal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own if name in self.own.flag_fields() else self.stack, name)

    def flag_fields(self) -> dict[str, Any]:
        return dict(self.own.flag_fields())

    def is_changed(self, name: str) -> bool:
        return bool((self.own if name in self.own.flag_fields() else self.stack).is_changed(name))


# rules of a stack in a model that has nothing to tell it beside its input
ALONE_RULES = (
    Rule(
        ('cross_attend',),
        lambda flags, dim: flags.has_cross_attention,
        'there is no other sequence to attend to here',
        {'cross_attend': True},
        'Leave it out.',
    ),
    Rule(
        ADAPTIVE,
        lambda flags, dim: flags.needs_condition,
        'there is no condition here',
        {'use_adaptive_rmsnorm': True},
        'Leave it out.',
        only_changed=True,
    ),
)


def grid_refusals(flags: VisionFlags, stack: StackFlags) -> list[str]:
    """Rotary positions on another grid than that of the patches."""
    if stack.rotary_axes is None or stack.rotary_axes == flags.grid:
        return []
    return [
        f'`rotary_axes={stack.rotary_axes}` of `attn_layers`: the grid of the patches is {flags.grid} (rows, columns). '
        f'Set it to that, or leave it out.'
    ]
