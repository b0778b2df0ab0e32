"""Polar positions: the content sets the length of a channel, the position its angle."""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.module import ExactBuffers, empty_parameter, last_rows
from x_transformers.tensor_types import Float, Int


class PolarEmbedding(ExactBuffers):
    """Angles of polar positions (PoPE), https://arxiv.org/abs/2509.10534.

    forward: positions (n) or (b n) -> angles (1|b n dim), and what is added to the angles of keys: a learned bias (heads 1 dim)
    between -2 pi and 0, which starts at 0, or anywhere between with ``bias_uniform_init``.
    """

    exact_buffers = ('inv_freq',)
    inv_freq: Tensor

    def __init__(self, dim: int, heads: int, bias_uniform_init: bool = False, base: float = 10000) -> None:
        super().__init__()
        self.dim = dim
        self.base = base
        self.bias_uniform_init = bias_uniform_init
        self.learned_bias = empty_parameter(heads, 1, dim)
        self.register_buffer('inv_freq', torch.empty(dim))
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        channels = torch.arange(self.dim, device=self.inv_freq.device).float()
        self.inv_freq.copy_(1.0 / self.base ** (channels / self.dim))
        self.learned_bias.uniform_(-2 * pi, 0.0) if self.bias_uniform_init else self.learned_bias.zero_()

    def forward(self, t: Int[Tensor, '... n'], offset: int = 0) -> tuple[Float[Tensor, '#b n d'], Float[Tensor, 'h 1 d']]:
        """``offset`` is accepted for the signature's sake and changes nothing, as in the original."""
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        t = (t if t.ndim == 2 else t.unsqueeze(0)).to(dtype)
        return t.unsqueeze(-1) * self.inv_freq.to(dtype), self.learned_bias.clamp(-2 * pi, 0.0)


def apply_polar_pos_emb(t: Float[Tensor, '... n d'], freqs: Float[Tensor, '... m d']) -> Float[Tensor, '... n e']:
    """Lengths ``softplus(t)`` at the angles of the last n rows of ``freqs``: (… n d) -> (… n 2d).

    The axes in front are aligned as broadcasting does: angles (m d), (h m d) or, if rows of the batch differ, (b 1 m d).
    Raises ValueError if ``freqs`` has too few rows.
    """
    n = t.shape[-2]
    if freqs.shape[-2] < n:
        raise ValueError(
            f'polar positions must cover all {n} tokens, memories and cached ones too, got {freqs.shape[-2]}. Pass those of '
            'all.'
        )
    freqs = last_rows(freqs, n)
    return place(t, freqs.cos(), freqs.sin())


def place(
    t: Float[Tensor, '... n d'], cos: Float[Tensor, '... n d'], sin: Float[Tensor, '... n d']
) -> Float[Tensor, '... n e']:
    """``[softplus(t) cos, softplus(t) sin]``, computed in float32 or wider."""
    length = F.softplus(t.to(torch.promote_types(t.dtype, torch.float32)))
    return torch.cat((length * cos, length * sin), dim=-1).to(t.dtype)
