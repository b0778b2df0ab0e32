"""Gates on the attended values, per head and per channel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.module import ConstantLinear
from x_transformers.tensor_types import Float

# sigmoid(10) is nearly one: a gate that starts open
OPEN = 10.0


def open_gate(dim: int, channels: int) -> ConstantLinear:
    """A linear gate that starts constant and open."""
    return ConstantLinear(dim, channels, bias_value=OPEN)


def gate_heads(out: Float[Tensor, 'b h n e'], x: Float[Tensor, 'b n d'], gate: nn.Module | None) -> Float[Tensor, 'b h n e']:
    """Each head of each token times a sigmoid, so that a head can do nothing. https://arxiv.org/abs/2306.12929"""
    if gate is None:
        return out
    opening: Tensor = gate(x)
    return out * opening.sigmoid().transpose(1, 2).unsqueeze(-1)


def gate_channels(
    out: Float[Tensor, 'b n c'], x: Float[Tensor, 'b n d'], gate: nn.Module | None, silu: bool = False
) -> Float[Tensor, 'b n c']:
    """Each channel times a sigmoid (AlphaFold 2), or a SiLU, of the token."""
    if gate is None:
        return out
    opening: Tensor = gate(x)
    return out * (F.silu(opening) if silu else opening.sigmoid())


def attention_on_attention(dim_in: int, dim_out: int, zero: bool, bias: bool = False) -> nn.Sequential:
    """The output projection as a gated linear unit. https://arxiv.org/abs/1908.06954"""
    return nn.Sequential(output_projection(dim_in, dim_out * 2, zero, bias), nn.GLU())


def output_projection(dim_in: int, dim_out: int, zero: bool, bias: bool = False) -> nn.Linear:
    return ConstantLinear(dim_in, dim_out, bias=bias) if zero else nn.Linear(dim_in, dim_out, bias=bias)
