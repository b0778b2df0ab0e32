"""Dropout of whole layers, or of tokens of the context."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.randomness import happens
from x_transformers.tensor_types import Bool, Float


def is_dropped(probability: float, device: torch.device | None = None) -> bool | Bool[Tensor, '']:
    """Whether a layer is left out this time, https://arxiv.org/abs/1603.09382; draws as ``randomness`` says.

    A compiled model has one course for both cases: there it is a tensor, drawn from torch's generator, by which one result or
    the other is taken.
    """
    if probability <= 0.0:
        return False
    if torch.compiler.is_compiling():
        return torch.rand((), device=device) < probability
    return happens(probability)


def dropout_seq(
    seq: Float[Tensor, 'b n d'], mask: Bool[Tensor, 'b n'] | None, dropout: float
) -> tuple[Float[Tensor, 'b k d'], Bool[Tensor, 'b k'] | None]:
    """Keep a random part of the tokens, ``max(1, floor((1 - dropout) * n))`` of them, in their order.

    Tokens that are masked out go first. Of ``count`` tokens that a row's mask keeps, the new mask keeps
    ``ceil((1 - dropout) * count)``. Structured dropout of https://arxiv.org/abs/2107.14795.
    """
    batch, n = seq.shape[:2]
    kept_part = 1.0 - dropout
    keep = max(1, int(kept_part * n))
    scores = torch.randn((batch, n), device=seq.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    chosen = scores.topk(keep, dim=-1).indices
    # valid tokens come first in the order of scores, so that a row's share of them is its first entries
    allowed = None
    if mask is not None:
        share = (mask.sum(dim=-1, keepdim=True) * kept_part).ceil()
        allowed = (torch.arange(keep, device=seq.device) < share) & mask.gather(1, chosen)
    chosen, order = chosen.sort(dim=-1)
    kept = seq.gather(1, chosen.unsqueeze(-1).expand(-1, -1, seq.shape[-1]))
    return kept, None if allowed is None else allowed.gather(1, order)
