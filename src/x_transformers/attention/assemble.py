"""Construction of the parts of one attention layer from its flags."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

from x_transformers.attention import tensor_product
from x_transformers.attention.attend import Attend
from x_transformers.attention.composition import ComposeHeads
from x_transformers.attention.differential import Differential
from x_transformers.attention.gates import attention_on_attention, open_gate, output_gate, output_projection, value_gate
from x_transformers.attention.hybrid import FoldAxially
from x_transformers.attention.path import HouseholderSteps
from x_transformers.attention.sharing import without_own_keys
from x_transformers.convolution import CausalConvolution
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.scores import AttendFlags
from x_transformers.module import branch_output, empty_parameter, stream_linear
from x_transformers.norms import MultiheadRMSNorm
from x_transformers.position.projected import RelativeProjectedBias
from x_transformers.unit_weights import UnitGain


def attention_parts(dim: int, flags: AttentionFlags, shares_keys: bool) -> dict[str, Any]:
    """All modules, parameters and constants, by name and in the order of the state."""
    parts = projection_parts(dim, flags) | key_value_parts(dim, flags) | output_parts(dim, flags)
    return without_own_keys(parts) if shares_keys else parts


def projection_parts(dim: int, flags: AttentionFlags) -> dict[str, Any]:
    """From tokens to the heads of queries, keys and values, directly or through latents."""
    dim_context = dim if flags.dim_context is None else flags.dim_context
    dim_q, dim_k = dim, dim_context
    parts: dict[str, Any] = {'to_latent_q': None, 'to_latent_kv': None, 'to_rotateable_k': None}
    if flags.dim_latent_q is not None:
        parts['to_latent_q'] = nn.Linear(dim_q, flags.dim_latent_q, bias=False)
        dim_q = flags.dim_latent_q
    if flags.dim_latent_kv is not None:
        parts['to_latent_kv'] = nn.Linear(dim_k, flags.dim_latent_kv, bias=False)
        if flags.latent_rope_subheads is not None:
            parts['to_rotateable_k'] = nn.Linear(dim_k, flags.dim_head * flags.latent_rope_subheads, bias=False)
        dim_k = flags.dim_latent_kv
    if flags.tensor_product:
        factors = tensor_product.projections(dim_q, dim_k, flags)
        parts |= factors._asdict()
        dim_q = factors.to_q.channels
    else:
        unit, keys = flags.unit_weights, flags.key_heads_from_latent
        parts['to_q'] = stream_linear(dim_q, flags.heads * flags.dim_head, bias=flags.has_bias('q'), unit=unit)
        parts['to_k'] = stream_linear(dim_k, keys * flags.dim_head, bias=flags.has_bias('k'), unit=unit)
        parts['to_v'] = stream_linear(dim_k, flags.num_kv_heads * flags.value_dim, bias=flags.has_bias('v'), unit=unit)
    parts['to_value_residual_mix'] = None
    if flags.learned_value_residual_mix:
        # decided by the tokens that the values belong to: of a context, if that has a width of its own
        dim_mix = dim_q if dim_context == dim else dim_context
        parts['to_value_residual_mix'] = nn.Sequential(nn.Linear(dim_mix, flags.num_kv_heads), nn.Sigmoid())
    return parts


def key_value_parts(dim: int, flags: AttentionFlags) -> dict[str, Any]:
    """What heads go through before they meet, learned keys and values, biases, and attention proper."""
    heads, kv_heads, dim_head, memories = flags.heads, flags.num_kv_heads, flags.dim_head, flags.num_mem_kv
    gains = flags.qk_norm and flags.qk_norm_dim_scale
    q_gains, k_gains = (1, 1) if flags.qk_norm_shared_gain else (heads, kv_heads)
    return {
        'qk_norm': flags.qk_norm or flags.unit_weights,
        'qk_norm_groups': flags.qk_norm_groups,
        'qk_norm_eps': flags.qk_norm_eps,
        'qk_norm_over_heads': flags.qk_norm_over_heads,
        'unit_gain': UnitGain(heads, 1, dim_head, held=dim**-0.5) if flags.unit_weights else None,
        'qk_norm_q_scale': empty_parameter(q_gains, 1, dim_head) if gains else None,
        'qk_norm_k_scale': empty_parameter(k_gains, 1, dim_head) if gains else None,
        'q_rmsnorm': MultiheadRMSNorm(dim_head, heads) if flags.qk_rmsnorm else None,
        'k_rmsnorm': MultiheadRMSNorm(dim_head, kv_heads) if flags.qk_rmsnorm or flags.k_rmsnorm else None,
        'value_rmsnorm': MultiheadRMSNorm(flags.value_dim, kv_heads) if flags.value_rmsnorm else None,
        'laser_clamp': flags.laser_softclamp_value if flags.laser else None,
        'num_mem_kv': memories,
        'mem_k': empty_parameter(kv_heads, memories, dim_head) if memories else None,
        'mem_v': empty_parameter(kv_heads, memories, flags.value_dim) if memories else None,
        **{name: build(dim, flags) for name, build in BIASES.items()},
        'composition': ComposeHeads.from_flags(dim, flags),
        'path_steps': HouseholderSteps.from_flags(dim, flags),
        'differential': Differential.from_flags(flags),
        'attend': build_attend(flags),
        'convolutions': build_convolutions(flags),
    }


def output_parts(dim: int, flags: AttentionFlags) -> dict[str, Any]:
    """From attended heads to what the layer writes."""
    heads, hybrid = flags.heads, flags.hybrid_module is not None
    return {
        'head_scale_params': empty_parameter(1, heads, 1, 1) if flags.head_scale else None,
        'to_v_head_gate': open_gate(dim, heads) if flags.gate_value_heads else None,
        'to_v_gate': value_gate(dim, flags),
        'to_output_gate': output_gate(flags),
        'gate_is_silu': flags.swiglu_values,
        'hybrid_module': build_hybrid(flags),
        'hybrid_norms': nn.ModuleList(MultiheadRMSNorm(flags.value_dim, heads) for _ in range(2)) if hybrid else None,
        'hybrid_mix': nn.Linear(dim, heads, bias=False) if hybrid and flags.hybrid_learned_mix else None,
        'orthogonal_copies': flags.orthog_projected_values + flags.orthog_projected_values_per_head,
        'to_out': build_output(dim, flags),
        'sublayer_dropout': nn.Dropout(flags.sublayer_dropout) if flags.sublayer_dropout > 0 else None,
    }


def build_attend(flags: AttentionFlags) -> Attend:
    """Scores, weights and output, with contextual positions inside if there are any."""
    shared = {name: getattr(flags, name) for name in AttendFlags.flag_fields() if name in flags.flag_fields()}
    own = {'scale': flags.score_scale, 'cope': build_contextual_positions(flags), 'sdp_kwargs': flags.attend_sdp_kwargs}
    return Attend.from_flags(AttendFlags(**shared | own))


def build_contextual_positions(flags: AttentionFlags) -> nn.Module | None:
    if not flags.use_cope:
        return None
    from x_transformers.attention.scores.contextual import CoPE

    return CoPE(
        dim=flags.dim_head,
        heads=flags.heads,
        max_pos=flags.cope_max_pos,
        talking_heads=flags.cope_talking_heads,
        soft_onehot=flags.cope_soft_onehot_pos,
    )


def build_forgetting(dim: int, flags: AttentionFlags) -> nn.Module | None:
    """A bias of learned forget gates, in place of any other bias."""
    if not flags.data_dependent_alibi:
        return None
    from x_transformers.position.forgetting import DataDependentAlibi, PerRowDataDependentAlibi

    kwargs = dict(flags.data_dependent_alibi_kwargs)
    if flags.data_dependent_alibi_per_row:
        width = flags.data_dependent_alibi_per_row_dim_head
        return PerRowDataDependentAlibi(dim=dim, heads=flags.heads, causal=flags.causal, dim_head=width, **kwargs)
    return DataDependentAlibi(dim=dim, heads=flags.heads, causal=flags.causal, **kwargs)


# biases that a layer makes of its own input, by their name in its state: they are added up, but for one that `replaces` others
BIASES: dict[str, Callable[[int, AttentionFlags], nn.Module | None]] = {
    'data_dependent_alibi': build_forgetting,
    'rel_proj_pos_bias': RelativeProjectedBias.from_flags,
}


def build_output(dim: int, flags: AttentionFlags) -> nn.Module:
    if flags.project_out is False:
        return nn.Identity()
    dim_in = flags.dim_attended * flags.orthogonal_outputs
    if flags.unit_weights:
        return branch_output(dim_in, flags.dim_out or dim, flags.out_bias, unit=True)
    build = attention_on_attention if flags.on_attn else output_projection
    return build(dim_in, flags.dim_out or dim, flags.zero_init_output, flags.out_bias, flags.output_proj_depth)


def build_convolutions(flags: AttentionFlags) -> nn.ModuleDict | None:
    """Of queries, keys and values over tokens."""
    if not flags.canon:
        return None
    keys = flags.num_kv_heads
    widths = {'q': flags.heads * flags.dim_head, 'k': keys * flags.dim_head, 'v': keys * flags.value_dim}
    return nn.ModuleDict({name: CausalConvolution(width, name) for name, width in widths.items()})


def build_hybrid(flags: AttentionFlags) -> nn.Module | None:
    """A copy of the user's module, which sees every n-th token if it is to be folded."""
    if flags.hybrid_module is None:
        return None
    module = deepcopy(flags.hybrid_module)
    return module if flags.hybrid_fold_axial_dim is None else FoldAxially(flags.hybrid_fold_axial_dim, module)
