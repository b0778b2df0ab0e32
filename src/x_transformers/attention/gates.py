"""Gates on the attended values, per head and per channel."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.hybrid import mix_hybrid, module_input, run_module
from x_transformers.module import ConstantLinear, Module, branch_output
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.attention.parts import AttentionParts
    from x_transformers.flags.attention import AttentionFlags

# sigmoid(10) is nearly one: a gate that starts open
OPEN = 10.0


def open_gate(dim: int, channels: int) -> ConstantLinear:
    """A linear gate that starts constant and open."""
    return ConstantLinear(dim, channels, bias_value=OPEN)


class LowRankGate(Module):
    """A linear gate through a narrow middle, that starts half open."""

    def __init__(self, dim: int, rank: int, channels: int, *, silu: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = ConstantLinear(rank, channels, bias=False)
        self.silu = silu

    def forward(self, t: Float[Tensor, '... d']) -> Float[Tensor, '... c']:
        narrow = self.down(t)
        opening: Tensor = self.up(F.silu(narrow) if self.silu else narrow)
        return opening


def half_open_gate(dim: int, channels: int, heads: int, rank: int | None, headwise: bool, silu: bool) -> nn.Module:
    """A gate per channel, or per head, that starts half open."""
    if rank is not None:
        return LowRankGate(dim, rank, channels, silu=silu)
    return ConstantLinear(dim, heads if headwise else channels, bias=False)


def value_gate(dim: int, flags: AttentionFlags) -> nn.Module | None:
    """The gate that reads the layer's input."""
    if not flags.gate_values:
        return None
    if flags.gate_starts_open:
        return open_gate(dim, flags.dim_attended)
    rank, headwise = flags.gate_values_rank, flags.gate_values_headwise
    return half_open_gate(dim, flags.dim_attended, flags.heads, rank, headwise, flags.low_rank_silu_gates)


def output_gate(flags: AttentionFlags) -> nn.Module | None:
    """The gate that reads the attended values themselves."""
    if not flags.output_gate:
        return None
    rank, headwise, width = flags.output_gate_rank, flags.output_gate_headwise, flags.dim_attended
    return half_open_gate(width, width, flags.heads, rank, headwise, flags.low_rank_silu_gates)


def gate_heads(out: Float[Tensor, 'b h n e'], x: Float[Tensor, 'b n d'], gate: nn.Module | None) -> Float[Tensor, 'b h n e']:
    """Each head of each token times a sigmoid, so that a head can do nothing. https://arxiv.org/abs/2306.12929"""
    if gate is None:
        return out
    opening: Tensor = gate(x)
    return out * opening.sigmoid().transpose(1, 2).unsqueeze(-1)


def gate_channels(
    out: Float[Tensor, 'b n (h e)'],
    x: Float[Tensor, 'b n d'],
    by_input: nn.Module | None,
    by_output: nn.Module | None = None,
    *,
    heads: int = 1,
    silu: bool = False,
) -> Float[Tensor, 'b n (h e)']:
    """Each channel, or head, times a sigmoid (AlphaFold 2), or a SiLU, of what input and output say together.

    https://arxiv.org/abs/2608.11805
    """
    if by_input is None and by_output is None:
        return out
    # a gate per head has one number for all of its channels
    openings = [gate(t).unflatten(-1, (heads, -1)) for gate, t in ((by_input, x), (by_output, out)) if gate is not None]
    total: Tensor = reduce(torch.add, openings)
    gated: Tensor = out.unflatten(-1, (heads, -1)) * (F.silu(total) if silu else total.sigmoid())
    return gated.flatten(-2)


def attention_on_attention(
    dim_in: int, dim_out: int, zero: bool, bias: bool = False, depth: int | None = None
) -> nn.Sequential:
    """The output projection as a gated linear unit. https://arxiv.org/abs/1908.06954"""
    return nn.Sequential(output_projection(dim_in, dim_out * 2, zero, bias, depth), nn.GLU())


def output_projection(dim_in: int, dim_out: int, zero: bool, bias: bool = False, depth: int | None = None) -> nn.Linear:
    return branch_output(dim_in, dim_out, bias, zero=zero, depth=depth)


def gated_heads(
    attn: AttentionParts, out: Float[Tensor, 'b h n e'], x: Float[Tensor, 'b n d'], inputs: BranchInputs
) -> tuple[Float[Tensor, 'b h n e'], Any]:
    """Head scale, head gates, then the mixture with the hybrid module, whose hidden state is returned too."""
    if attn.head_scale_params is not None:
        out = out * attn.head_scale_params
    if attn.to_v_head_gate is not None:
        out = gate_heads(out, x, attn.to_v_head_gate)
    if attn.hybrid_module is None or attn.hybrid_norms is None:
        return out, None
    x_shown, keywords = module_input(x, attn.flags.hybrid_mask_kwarg, inputs.padding, attn.causal)
    other, hidden = run_module(attn.hybrid_module, x_shown, inputs.past, **keywords)
    return mix_hybrid(out, other, attn.hybrid_norms, None if attn.hybrid_mix is None else attn.hybrid_mix(x)), hidden
