"""Conversion from channels to heads and back, and memories before the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.tensor_types import Float


def split_heads(t: Float[Tensor, 'b n (h d)'], heads: int) -> Float[Tensor, 'b h n d']:
    batch, n, channels = t.shape
    return t.view(batch, n, heads, channels // heads).transpose(1, 2)


def merge_heads(t: Float[Tensor, 'b h n d']) -> Float[Tensor, 'b n (h d)']:
    return t.transpose(1, 2).flatten(2)


def with_memories(t: Float[Tensor, 'b n d'], mem: Float[Tensor, 'b l d']) -> Tensor:
    return torch.cat((mem.to(t.dtype), t), dim=-2)
