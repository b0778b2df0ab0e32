"""Cosine similarity: queries and keys of unit length. https://arxiv.org/abs/2010.04245"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from x_transformers.helpers import l2norm
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.parts import AttentionParts


def unit_heads(
    t: Float[Tensor, '... h n d'],
    groups: int = 1,
    gains: Float[Tensor, '#h 1 d'] | None = None,
    eps: float | None = None,
    over_heads: bool = False,
) -> Float[Tensor, '... h n d']:
    """Unit length for each of ``groups`` chunks of a head, then learned gains per channel (https://arxiv.org/abs/2302.05442).

    With ``eps`` the length is that of a root mean square norm: eps is added to the mean square of a chunk. ``over_heads``: all
    heads of a token together have unit length (https://arxiv.org/abs/2501.00656).
    """
    normed = unit_together(t, eps) if over_heads else l2norm(t, groups, eps)
    return (normed if gains is None else normed * gains).to(t.dtype)


def unit_together(t: Float[Tensor, '... h n d'], eps: float | None) -> Float[Tensor, '... h n d']:
    tokens = t.transpose(-3, -2)
    return l2norm(tokens.flatten(-2), eps=eps).view(tokens.shape).transpose(-3, -2)


def normed_keys(attn: AttentionParts, k: Float[Tensor, 'b kh m d']) -> Float[Tensor, 'b kh m d']:
    """The keys of a layer after all of its norms."""
    if attn.qk_norm:
        k = unit_heads(k, attn.qk_norm_groups, attn.qk_norm_k_scale, attn.qk_norm_eps, attn.qk_norm_over_heads)
    return k if attn.k_rmsnorm is None else attn.k_rmsnorm(k).to(k.dtype)
