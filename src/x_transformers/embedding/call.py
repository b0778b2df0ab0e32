"""The arguments of one forward of a model, and what is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.ids import token_ids
from x_transformers.embedding.token import check_mask
from x_transformers.tensor_types import Bool, Float, Int


@dataclass(frozen=True)
class Call:
    """The arguments of one forward, without those that say what is returned.

    ``x`` is what the sequence's length is read from: token ids (b n), vectors (b n d), or one of several inputs.
    """

    x: Tensor
    mask: Bool[Tensor, 'b n'] | None = None
    lens: Int[Tensor, ' b'] | None = None
    numbers: Float[Tensor, 'b n'] | None = None
    mems: Sequence[Float[Tensor, 'b l d']] | None = None
    mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None
    detach_mems: bool = True
    recycle_steps: int | None = None
    pos: Tensor | None = None
    prepend_embeds: Float[Tensor, 'b p e'] | None = None
    prepend_mask: Bool[Tensor, 'b p'] | None = None
    embed_ids: Mapping[str, Int[Tensor, 'b n']] = field(default_factory=dict)
    sum_embeds: Float[Tensor, '#b #n e'] | None = None
    seq_start_pos: Int[Tensor, ' b'] | None = None
    cache: KVCache | None = None
    new_only: bool = False
    cache_age: int | None = None
    token_emb_kwargs: Mapping[str, Any] = field(default_factory=dict)
    to_logits_kwargs: Mapping[str, Any] = field(default_factory=dict)
    logits_last: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def pos_ids(self) -> Int[Tensor, '...'] | None:
        """Positions as numbers; those of floating dtype are embeddings already."""
        return None if self.pos is None or self.pos.is_floating_point() else self.pos


def last_positions(t: Tensor, count: int | None) -> Tensor:
    return t if count is None or count >= t.shape[1] else t[:, t.shape[1] - count :]


def ids_or_none(x: Tensor | None, prepend_embeds: Tensor | None, *, own_table: bool = False) -> Int[Tensor, 'b n']:
    """The token ids; no tokens at all where only embeddings were given. A table of the user's own may read more axes."""
    if x is None:
        if prepend_embeds is None:
            raise ValueError('x is None: without token ids there must be prepend_embeds.')
        return torch.empty(prepend_embeds.shape[0], 0, dtype=torch.long, device=prepend_embeds.device)
    if not own_table or not isinstance(x, Tensor):
        x = token_ids(x)
    if x.ndim < 2 or (x.ndim > 2 and not own_table):
        raise ValueError(f'x must be a batch of sequences (b n), got shape {tuple(x.shape)}; a single one is x.unsqueeze(0).')
    return x


def check_added(call: Call, batch: int, dim: int) -> None:
    """Positions, and what is added to the embeddings, fit batch and width. Lengths are checked where they are cut."""
    start = call.seq_start_pos
    if start is not None and (start.shape != (batch,) or start.is_floating_point() or start.dtype == torch.bool):
        raise ValueError(
            f'seq_start_pos must be one whole number per row, ({batch},), got {start.dtype} of shape {tuple(start.shape)}.'
        )
    if call.pos is not None:
        axes = call.pos.shape[:-1] if call.pos_ids is not None else call.pos.shape[:-2]
        if call.pos.ndim == 0 or tuple(axes) not in ((), (1,), (batch,)):
            raise ValueError(
                f'pos must be one position per token, (n) or ({batch} n), or their embeddings, (n e) or ({batch} n e), '
                f'got {call.pos.dtype} of shape {tuple(call.pos.shape)}.'
            )
    added = call.sum_embeds
    if added is not None and (added.ndim != 3 or added.shape[0] not in (1, batch) or added.shape[-1] not in (1, dim)):
        raise ValueError(f'sum_embeds must have shape ({batch}, tokens, {dim}), got {tuple(added.shape)}.')


def check_prepended(embeds: Tensor, mask: Tensor | None, batch: int, dim: int) -> None:
    if embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[-1] != dim:
        raise ValueError(f'prepend_embeds must have shape ({batch}, length, {dim}), got {tuple(embeds.shape)}.')
    check_mask(mask, batch, embeds.shape[1], 'prepend_mask', 'one entry per prepended embedding')


def check_frames(x: Tensor, width: int | None = None) -> None:
    """Frames are a batch of sequences of vectors."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f'x must be a tensor of floating dtype, got {kind}; token ids go through TransformerWrapper')
    if x.ndim != 3:
        raise ValueError(f'x must be a batch of sequences of vectors (b n d), got shape {tuple(x.shape)}')
    if width is not None and x.shape[-1] != width:
        raise ValueError(f'x must hold vectors of width {width}, got shape {tuple(x.shape)}')
