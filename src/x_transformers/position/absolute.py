"""Absolute positions, added to the embeddings: learned or sinusoidal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.base import FlagError
from x_transformers.helpers import counted, divisible_by, l2norm
from x_transformers.module import Module, empty_parameter, untouched
from x_transformers.tensor_types import Float, Int, Shaped


def token_positions(
    n: int,
    pos: Int[Tensor, '... n'] | None,
    seq_start_pos: Int[Tensor, ' b'] | None,
    offset: int | Int[Tensor, ' 1'],
    device: torch.device,
) -> Int[Tensor, 'n'] | Int[Tensor, 'b n']:
    """``pos``, or 0 … n-1 behind ``offset``; where a row starts late (padding on the left), counted from its start on."""
    if pos is None:
        pos = counted(offset, n, device)
    if seq_start_pos is not None:
        pos = (pos - seq_start_pos.unsqueeze(-1)).clamp(min=0)
    return pos


class Table(nn.Embedding):
    """A table of vectors that starts from a normal distribution of the given width."""

    def __init__(self, rows: int, dim: int, std: float = 1.0) -> None:
        self.std = std
        super().__init__(rows, dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # without memory there is nothing to fill, and torch would import its compiler to find that out
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


def look_up(
    table: Table, ids: Int[Tensor, '...'], name: str, hint: str = '. Is a padding or ignored index still among them?'
) -> Float[Tensor, '... d']:
    """Rows of a table, with errors that name the ids and their range."""
    if ids.dtype not in (torch.int64, torch.int32):
        ids = token_ids(ids, name)
    # a compiler has no use for the check, unless somebody listens to the table or has put another in its place
    if torch.compiler.is_compiling() and untouched(table, Table):
        return F.embedding(ids, table.weight)
    try:
        rows: Tensor = table(ids)
    except IndexError:
        low, high = int(ids.min()), int(ids.max())
        raise IndexError(
            f'{name} must lie in 0 … {table.num_embeddings - 1} (the table has {table.num_embeddings} rows), '
            f'but they range from {low} to {high}{hint}'
        ) from None
    return rows


class AbsolutePositionalEmbedding(Module):
    """A learned vector for each position up to ``max_seq_len``, times ``dim ** -0.5``, or of unit length with ``l2norm_embed``.

    forward: x (b n …) -> (n dim), or (b n dim) where rows differ: with ``pos`` (b n) or ``seq_start_pos`` (b), which is where
    each row starts. ``offset``: how many tokens went before. The table starts from N(0, init_std²).
    Raises ValueError if the sequence is longer than the table.
    """

    def __init__(self, dim: int, max_seq_len: int, l2norm_embed: bool = False, *, init_std: float = 1.0) -> None:
        super().__init__()
        self.scale = 1.0 if l2norm_embed else dim**-0.5
        self.max_seq_len = max_seq_len
        self.l2norm_embed = l2norm_embed
        self.emb = Table(max_seq_len, dim, std=init_std)

    def forward(
        self,
        x: Shaped[Tensor, 'b n ...'],
        pos: Int[Tensor, 'n'] | Int[Tensor, 'b n'] | None = None,
        seq_start_pos: Int[Tensor, 'b'] | None = None,
        offset: int | Int[Tensor, ' 1'] = 0,
    ) -> Float[Tensor, 'n d'] | Float[Tensor, 'b n d']:
        n = x.shape[1]
        last = n + offset if isinstance(offset, int) else n
        # positions of the caller's own may come several times, and the table names those that it lacks
        if pos is None and last > self.max_seq_len:
            raise ValueError(
                f'The sequence must end within the absolute positions, max_seq_len = {self.max_seq_len}, got position {last}. '
                'Shorten the sequence, or raise max_seq_len.'
            )
        at = token_positions(n, pos, seq_start_pos, offset, x.device)
        vectors = look_up(self.emb, at, 'pos', f': raise max_seq_len={self.max_seq_len}, or shorten the sequence') * self.scale
        return l2norm(vectors) if self.l2norm_embed else vectors


class ScaledSinusoidalEmbedding(Module):
    """Sines and cosines of the position, https://arxiv.org/abs/1706.03762, times one learned scale that starts at dim ** -0.5.

    forward: x (b n …) -> (n dim), or (b n dim) where rows differ, with the arguments of ``AbsolutePositionalEmbedding``.
    Raises FlagError if ``dim`` is odd.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        if not divisible_by(dim, 2):
            raise FlagError(
                f'dim must be even for sinusoidal positions, half for sines and half for cosines, got {dim}. Take an even '
                'width.'
            )
        self.dim = dim
        self.theta = theta
        self.scale = empty_parameter(1)
        self.register_buffer('inv_freq', torch.empty(dim // 2), persistent=False)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.constant_(self.scale, self.dim**-0.5)
        half = self.dim // 2
        self.inv_freq.copy_(self.theta ** -(torch.arange(half, device=self.inv_freq.device).float() / half))

    def forward(
        self,
        x: Shaped[Tensor, 'b n ...'],
        pos: Int[Tensor, 'n'] | Int[Tensor, 'b n'] | None = None,
        seq_start_pos: Int[Tensor, 'b'] | None = None,
        offset: int | Int[Tensor, ' 1'] = 0,
    ) -> Float[Tensor, 'n d'] | Float[Tensor, 'b n d']:
        at = token_positions(x.shape[1], pos, seq_start_pos, offset, x.device)
        # half precision cannot count far enough
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        angles = at.to(dtype).unsqueeze(-1) * self.inv_freq.to(dtype)
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.scale.dtype) * self.scale
