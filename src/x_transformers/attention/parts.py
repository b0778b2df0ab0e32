"""The base class that lists the parts of an attention layer, for the steps that receive the layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from x_transformers.attention.tensor_product import KeyValueFactors, OuterProducts
from x_transformers.flags.attention import AttentionFlags
from x_transformers.module import Module
from x_transformers.tensor_types import Float
from x_transformers.unit_weights import UnitGain


class Seen(NamedTuple):
    """The tokens that each projection reads. ``keys`` and ``values`` have the memories in front, ``mems`` of them."""

    x: Float[Tensor, 'b n d']
    queries: Float[Tensor, 'b n c']
    keys: Float[Tensor, 'b m c']
    values: Float[Tensor, 'b m c']
    mems: int


class AttentionParts(Module):
    """An attention layer, as its steps see it: sizes, and parts, which are None unless a flag asks for them.

    ``attention/assemble.py`` makes them; ``Attention`` says what happens to tokens.
    """

    flags: AttentionFlags
    dim: int
    dim_context: int
    heads: int
    kv_heads: int
    dim_head: int
    value_dim_head: int
    causal: bool
    max_attend_past: int | None
    max_attend_future: int | None
    rotated_heads: int | None
    separate_views: bool
    # keys and values are those of an earlier layer
    shares_keys: bool
    # flags that have no meaning where keys are another sequence's
    needing_own_keys: tuple[str, ...]
    # flags with which outputs of seen tokens depend on new ones
    why_no_cache: tuple[str, ...]
    can_cache_kv: bool

    # tokens to heads; a latent in between where flags ask for one
    to_latent_q: nn.Linear | None
    to_latent_kv: nn.Linear | KeyValueFactors | None
    to_rotateable_k: nn.Linear | None
    to_q: nn.Linear | OuterProducts
    to_k: nn.Linear | OuterProducts
    to_v: nn.Linear | OuterProducts
    to_value_residual_mix: nn.Module | None
    convolutions: nn.ModuleDict | None
    # what heads go through before they meet
    qk_norm: bool
    qk_norm_groups: int
    qk_norm_eps: float | None
    qk_norm_over_heads: bool
    qk_norm_q_scale: nn.Parameter | None
    qk_norm_k_scale: nn.Parameter | None
    q_rmsnorm: nn.Module | None
    k_rmsnorm: nn.Module | None
    value_rmsnorm: nn.Module | None
    unit_gain: UnitGain | None
    num_mem_kv: int
    mem_k: nn.Parameter | None
    mem_v: nn.Parameter | None
    laser_clamp: float | None
    attend: nn.Module
    # from heads to what is written
    head_scale_params: nn.Parameter | None
    to_v_head_gate: nn.Module | None
    to_v_gate: nn.Module | None
    to_output_gate: nn.Module | None
    gate_is_silu: bool
    hybrid_module: nn.Module | None
    hybrid_norms: nn.ModuleList | None
    hybrid_mix: nn.Module | None
    orthogonal_copies: int
    to_out: nn.Module
    sublayer_dropout: nn.Module | None
