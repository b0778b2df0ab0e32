"""Modules that published models need and that no flag builds."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.module import Module, empty_parameter, fill
from x_transformers.position.absolute import Table, look_up
from x_transformers.tensor_types import Bool, Float, Int


class TypedTokenEmbedding(Module):
    """Token vectors plus those of the segment that a token belongs to, as in BERT (https://arxiv.org/abs/1810.04805).

    forward: x (b n) and, by ``token_emb_kwargs``, ``token_type_ids`` (b n); without them all tokens are of type 0.
    ``TypedTokenEmbedding(dim, num_tokens, num_types)``: width, tokens and types that there are.
    """

    def __init__(self, dim: int, num_tokens: int, num_types: int) -> None:
        super().__init__()
        self.emb = Table(num_tokens, dim, std=0.02)
        self.types = Table(num_types, dim, std=0.02)

    def forward(self, x: Int[Tensor, 'b n'], token_type_ids: Int[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n d']:
        vectors = look_up(self.emb, x, 'x: token ids')
        if token_type_ids is None:
            return vectors + look_up(self.types, x.new_zeros(x.shape), 'token_type_ids')
        # with a cache the ids of all tokens may be given, of which the newest are asked
        return vectors + look_up(self.types, token_type_ids[..., -x.shape[-1] :], 'token_type_ids')


class WhisperEncoder(Module):
    """Frames of sound to vectors, as in Whisper (https://arxiv.org/abs/2212.04356): two convolutions, sinusoids, a stack
    (``attn_layers``).

    forward: a spectrogram x (b c t) of ``num_mels`` channels -> (b n d), with half as many frames, n = (t + 1) // 2, of which
    ``mask`` (b n) may hide some. Raises ValueError if x has other channels or n is more than ``max_seq_len``.
    """

    def __init__(self, *, attn_layers: nn.Module, num_mels: int, max_seq_len: int) -> None:
        super().__init__()
        stack: Any = attn_layers
        self.num_mels, self.max_seq_len = num_mels, max_seq_len
        self.conv_in = nn.Conv1d(num_mels, stack.dim, 3, padding=1)
        self.conv_down = nn.Conv1d(stack.dim, stack.dim, 3, stride=2, padding=1)
        self.pos_emb = empty_parameter(max_seq_len, stack.dim).requires_grad_(False)
        self.attn_layers: Any = attn_layers
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        length, dim = self.pos_emb.shape
        device = self.pos_emb.device
        waves = torch.exp(torch.arange(dim // 2, device=device) * (-math.log(10000.0) / (dim // 2 - 1)))
        angles = torch.arange(length, device=device)[:, None] * waves
        fill(self.pos_emb, torch.cat((angles.sin(), angles.cos()), dim=-1))

    def forward(self, x: Float[Tensor, 'b c t'], mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n d']:
        if x.ndim != 3 or x.shape[1] != self.num_mels or not 0 < x.shape[2] <= 2 * self.max_seq_len:
            raise ValueError(
                f'x must be a spectrogram (batch, {self.num_mels}, frames) of at most {2 * self.max_seq_len} frames, '
                f'got {tuple(x.shape)}. Cut it.'
            )
        h = F.gelu(self.conv_down(F.gelu(self.conv_in(x)))).transpose(1, 2)
        out: Tensor = self.attn_layers(h + self.pos_emb[: h.shape[1]], mask=mask)
        return out
