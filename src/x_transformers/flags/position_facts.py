"""What the flags of a stack say of positions, taken together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from x_transformers.flags.rotary_scaling import BY_LENGTH, complaints

if TYPE_CHECKING:
    from x_transformers.flags.attention import AttentionFlags

ANY_POSITION_BIAS = ('alibi_pos_bias', 'rel_pos_bias', 'dynamic_pos_bias')


class PositionFacts:
    """A part of ``StackFlags`` that only reads its other fields."""

    if TYPE_CHECKING:
        heads: int
        varying: Mapping[str, tuple[Any, ...]]
        rotary_pos_emb: bool
        rotary_xpos: bool
        rotary_emb_dim: int | None
        rotary_whole_head: bool
        rotary_scaling: Mapping[str, Any] | None
        rotary_axes: tuple[int, ...] | None
        polar_pos_emb: bool
        rel_pos_bias: bool
        alibi_num_heads: int | None
        disable_abs_pos_emb: bool | None

        @property
        def attentions(self) -> tuple[AttentionFlags, ...]: ...
        @property
        def attn_dim_head(self) -> int: ...

    @cached_property
    def rotary(self) -> bool:
        return self.rotary_pos_emb or self.rotary_xpos

    @cached_property
    def depends_on_places(self) -> bool:
        """Whether a turned query meets something that is not turned: learned keys have no place, contextual positions neither.
        Or whether scales that cancel in products, those of xpos, are compared by distance. Or whether the length counts. Or
        whether channels that turn together have gains of their own behind the turn, as queries of unit length have.

        Then it matters where a row begins; otherwise only distances between places do.
        """
        on_grid = self.rotary and self.rotary_axes is not None
        return (
            on_grid
            or self.rotary_by_length
            or any(
                attention.num_mem_kv > 0
                or attention.use_cope
                or (self.rotary_xpos and attention.l2_distance)
                or (self.rotary and attention.unit_weights)
                for attention in self.attentions
            )
        )

    @cached_property
    def rotary_dim(self) -> int:
        narrowest = min((flags.dim_head for flags in self.attentions), default=self.attn_dim_head)
        usual = narrowest if self.rotary_whole_head else narrowest // 2
        return usual if self.rotary_emb_dim is None else self.rotary_emb_dim

    @cached_property
    def rotary_by_length(self) -> bool:
        """Whether the frequencies of any layer depend on how long the sequence is."""
        scalings = self.varying.get('rotary_scaling', (self.rotary_scaling,))
        return any(scaling is not None and scaling.get('type') in BY_LENGTH for scaling in scalings)

    @cached_property
    def rotary_scaling_complaints(self) -> str:
        return '' if self.rotary_scaling is None else '; '.join(complaints(self.rotary_scaling, self.rotary_dim))

    @cached_property
    def polar(self) -> bool:
        return self.polar_pos_emb

    @cached_property
    def position_bias(self) -> str | None:
        """The flag that chose a position bias of the stack: alibi_pos_bias, rel_pos_bias, dynamic_pos_bias or None."""
        return next((name for name in ANY_POSITION_BIAS if getattr(self, name)), None)

    @cached_property
    def alibi_heads(self) -> int:
        return self.heads if self.alibi_num_heads is None else self.alibi_num_heads

    @cached_property
    def disables_abs_pos_emb(self) -> bool:
        if self.disable_abs_pos_emb is not None:
            return self.disable_abs_pos_emb
        return self.rel_pos_bias or self.rotary or self.polar
