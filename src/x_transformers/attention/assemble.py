"""The parts of one attention layer, made from its flags."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from torch import nn

from x_transformers.attention.attend import Attend
from x_transformers.attention.gates import attention_on_attention, output_projection
from x_transformers.attention.hybrid import FoldAxially
from x_transformers.convolution import CausalConvolution
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.scores import AttendFlags
from x_transformers.module import branch_output
from x_transformers.position.projected import RelativeProjectedBias


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
