"""The flags of the size of a stack, and of its inputs.

The other flags of a stack stand in ``norms.py``, ``positions.py``, ``layouts.py``, ``residuals.py`` and ``across_layers.py``:
each class on the one before, because signatures have this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from x_transformers.flags.base import REQUIRED, flag
from x_transformers.flags.layered import LayeredFlags
from x_transformers.flags.rule import Rule


@dataclass(frozen=True, kw_only=True, repr=False)
class StructureFlags(LayeredFlags):
    """The first flags of ``StackFlags``."""

    dim: int = flag(REQUIRED, 'Width of the stack.', low=1, often=True, family='layers')
    depth: int | None = flag(
        None, 'Number of blocks.', low=0, often=True, family='layers',
        rules=(
            Rule(
                ('depth', 'custom_layers', 'layers_execute_order'),
                lambda flags, dim: None not in (flags.depth, flags.custom_layers, flags.layers_execute_order),
                'the number of layers would be said three times', {'custom_layers': ('a', 'f'), 'layers_execute_order': (0, 1)},
                'Leave out [depth].',
            ),
        ),
    )  # fmt: skip
    heads: int = flag(8, 'Number of query heads.', low=1, each='attention', often=True, family='layers')
    causal: bool = flag(False, 'A token attends to no later token.', family='layers')
    cross_attend: bool = flag(
        False, 'Blocks also attend to another sequence, the context.', family='layers',
        rules=(
            Rule(
                ('cross_attend', 'custom_layers'),
                lambda flags, dim: flags.custom_layers is not None and flags.cross_attend != ('c' in flags.custom_layers),
                "a stack attends to a context exactly if it has layers of kind 'c'", {'custom_layers': ('a', 'c', 'f')},
                "Set [cross_attend] together with a layer 'c', or neither.",
            ),
        ),
    )  # fmt: skip
    only_cross: bool = flag(
        False, 'Blocks attend to the context only.', parent='cross_attend',
        rules=(
            Rule(
                ('only_cross', 'custom_layers'),
                lambda flags, dim: flags.only_cross and flags.custom_layers is not None and 'a' in flags.custom_layers,
                'the layers are spelt out, with self attention',
                {'cross_attend': True, 'only_cross': True, 'custom_layers': ('a', 'c', 'f')},
            ),
        ),
    )  # fmt: skip

    @cached_property
    def attn_dim_head(self) -> int:
        return self.attention.dim_head
