"""What the flags of an attention layer say, taken together."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING


class AttentionFacts:
    """A part of ``AttentionFlags`` that only reads its other fields.

    ``value_dim``: width of one value head; ``score_scale``: factor of the scores; ``rotated_heads``: how many of the last heads
    are rotated; ``key_heads_from_latent``: key heads that ``to_k`` makes; ``orthogonal_outputs``: how many copies of their
    values' width reach ``to_out``.
    """

    if TYPE_CHECKING:
        heads: int
        dim_head: int
        kv_heads: int | None
        one_kv_head: bool
        value_dim_head: int | None
        scale: float | None
        qk_norm: bool
        unit_weights: bool
        qk_norm_scale: float
        qkv_bias: bool | tuple[str, ...]
        rotate_num_heads: int | None
        latent_rope_subheads: int | None
        use_latent_kv: bool
        tensor_product: bool
        gate_values_rank: int | None
        gate_values_headwise: bool
        output_gate: bool
        orthog_projected_values: bool
        orthog_projected_values_per_head: bool

        @classmethod
        def having(cls, trait: str) -> tuple[str, ...]: ...

    @cached_property
    def num_kv_heads(self) -> int:
        if self.one_kv_head:
            return 1
        return self.heads if self.kv_heads is None else self.kv_heads

    @cached_property
    def value_dim(self) -> int:
        return self.dim_head if self.value_dim_head is None else self.value_dim_head

    @cached_property
    def score_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        if self.unit_weights:
            return float(self.dim_head**0.5)
        return float(self.qk_norm_scale) if self.qk_norm else self.dim_head**-0.5

    def has_bias(self, name: str) -> bool:
        """Whether the projection called 'q', 'k' or 'v' has a bias."""
        return self.qkv_bias if isinstance(self.qkv_bias, bool) else name in self.qkv_bias

    @cached_property
    def rotated_heads(self) -> int | None:
        """None: all of them, of queries and of keys."""
        return self.latent_rope_subheads if self.latent_rope_subheads is not None else self.rotate_num_heads

    @cached_property
    def key_heads_from_latent(self) -> int:
        return self.num_kv_heads - (self.latent_rope_subheads or 0)

    @property
    def caches_latent(self) -> bool:
        """Whether the cache keeps what keys and values are made of."""
        return self.use_latent_kv or self.tensor_product

    @cached_property
    def tied_to_causality(self) -> tuple[str, ...]:
        """The flags that are on and were built for a layer that is causal, or for one that is not."""
        return tuple(name for name in self.having('built_causal') if getattr(self, name))

    @cached_property
    def gate_starts_open(self) -> bool:
        """Whether ``gate_values`` alone is asked for, which is the gate of 2.16.1."""
        return self.gate_values_rank is None and not (self.gate_values_headwise or self.output_gate)

    @cached_property
    def dim_attended(self) -> int:
        """Width of the heads side by side."""
        return self.heads * self.value_dim

    @cached_property
    def orthogonal_outputs(self) -> int:
        return max(1, self.orthog_projected_values + self.orthog_projected_values_per_head)
