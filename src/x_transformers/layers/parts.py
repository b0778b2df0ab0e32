"""The base class that lists the parts of a stack, for the checks and preparations of a call."""

from __future__ import annotations

from typing import Any

from torch import nn

from x_transformers.flags.stack import StackFlags
from x_transformers.layers.plan import LayerPlan
from x_transformers.module import Module
from x_transformers.position.polar import PolarEmbedding
from x_transformers.position.rotary import RotaryEmbedding


class StackParts(Module):
    """A stack of layers, as those see it who prepare its calls.

    ``layers/assemble.py`` and ``layers/choose.py`` make the parts; ``AttentionLayers`` says what happens to tokens.
    """

    flags: StackFlags
    dim: int
    causal: bool
    # whether tokens see no later token; PrefixDecoder's layers do not, but its mask does
    is_causal: bool
    layers: nn.ModuleList
    layer_dropouts: list[float]
    # kinds of layers whose scores later ones add to their own
    hands_on_scores: tuple[str, ...]
    softclamp_value: float | None
    need_condition: bool
    norm_need_condition: bool
    dim_condition: int
    # over several layers, None unless a flag asks for them
    layer_integrators: Any
    skip_combines: Any
    lambdas: Any
    mudd: Any
    adaptive_mlp: nn.Module | None
    reinject_input_proj: nn.Linear | None
    learned_reinject_input_gate: nn.Linear | None
    unet_skips: bool
    add_value_residual: bool
    cross_attn_tokens_dropout: float
    # positions of all layers, likewise
    rotary_pos_emb: RotaryEmbedding | None
    other_rotaries: nn.ModuleList | None
    rotary_of_layer: tuple[int, ...]
    polar_pos_emb: PolarEmbedding | None
    rel_pos: nn.Module | None
    uses_positions: bool
    depends_on_places: bool

    @property
    def plan(self) -> LayerPlan:
        """The order of layers."""
        raise NotImplementedError

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may go on from a cache."""
        raise NotImplementedError

    def _layers(self) -> list[Any]:
        raise NotImplementedError
