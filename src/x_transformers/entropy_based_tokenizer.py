"""Segmentation of a sequence where a model's entropy is high, https://arxiv.org/abs/2412.09871."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.calls import CutOptions
from x_transformers.flags.fit import check_net
from x_transformers.flags.objectives import TokenizerOptions, options
from x_transformers.generation.modes import eval_decorator
from x_transformers.losses import calc_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int


def calc_entropy_from_logits(logits: Float[Tensor, '... v']) -> Float[Tensor, '...']:
    """Entropy in nats of the distribution that the logits stand for."""
    return calc_entropy(logits)


class EntropyBasedTokenizer(Module):
    """Groups bytes into segments; a segment ends where the entropy of the next byte is high.

    Args:
        decoder: a causal language model, tokens ``b n`` to logits ``b n v``.
        entropy_threshold: a position whose next-token entropy (in nats) reaches this closes a segment.
        max_token_size: the maximum length of a segment.
        accumulate_entropy: a segment ends where the entropy summed since the last segment reaches the threshold
            (https://www.nature.com/articles/s41467-026-73345-0).
        ignore_entropy_below: entropies below this do not count for that.
    """

    def __init__(
        self,
        decoder: nn.Module,
        entropy_threshold: float,
        max_token_size: int | None = None,
        accumulate_entropy: bool = False,
        ignore_entropy_below: float = 0.0,
    ) -> None:
        super().__init__()
        options(TokenizerOptions, 'EntropyBasedTokenizer', locals())
        check_net(decoder, 'EntropyBasedTokenizer', name='decoder', reads_later_tokens=True)
        if ignore_entropy_below > entropy_threshold:
            raise ValueError(
                f'ignore_entropy_below must be at most entropy_threshold={entropy_threshold}, got {ignore_entropy_below}. '
                'Above it, no entropy that closes a segment would count.'
            )
        if ignore_entropy_below != 0.0 and not accumulate_entropy:
            raise ValueError('ignore_entropy_below must be left out without accumulate_entropy=True, where nothing is summed.')
        self.accumulate_entropy = accumulate_entropy
        self.ignore_entropy_below = ignore_entropy_below
        self.decoder = decoder
        self.entropy_threshold = entropy_threshold
        self.max_token_size = max_token_size

    def boundaries(self, entropies: Float[Tensor, 'b n'], lens: Int[Tensor, 'b'] | None) -> Bool[Tensor, 'b n']:
        """True where a segment ends: at surprises, at each row's last valid position, and where it would grow too long."""
        rows, length = entropies.shape
        seq = torch.arange(length, device=entropies.device)
        last = torch.full((rows, 1), length - 1, device=seq.device) if lens is None else lens[:, None] - 1
        surprises = entropies >= self.entropy_threshold
        if self.accumulate_entropy:
            counted = entropies.masked_fill(entropies < self.ignore_entropy_below, 0.0)
            surprises = reached(counted, self.entropy_threshold)
        closes = (surprises | (seq == last)) & (seq <= last)
        if self.max_token_size is not None:
            start_after = (torch.where(closes, seq + 1, 0)).cummax(dim=-1).values
            start = torch.cat((torch.zeros_like(start_after[:, :1]), start_after[:, :-1]), dim=-1)
            closes = closes | (((seq - start + 1) % self.max_token_size == 0) & (seq <= last))
        return closes

    @torch.no_grad()
    @eval_decorator
    def forward(
        self,
        seq: Int[Tensor, '... n'],
        lens: Int[Tensor, 'b'] | None = None,
        return_segmented_seq: bool = False,
        decoder_forward_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Lengths of the segments, ``(b, segments)`` padded with 0, or the segments themselves (a tuple of tensors per row).

        Args:
            seq: ids, ``n`` or ``b n``.
            lens: the length of each row; later tokens are in no segment.
            return_segmented_seq: return the segments in place of their lengths.
            decoder_forward_kwargs: for the decoder.
        """
        keywords = {'return_segmented_seq': return_segmented_seq, 'decoder_forward_kwargs': decoder_forward_kwargs}
        options(CutOptions, 'EntropyBasedTokenizer', keywords)
        seq = token_ids(seq, 'seq')
        check_sequences(seq, lens)
        batch = seq if seq.ndim == 2 else seq[None]
        logits = self.decoder(batch, **(decoder_forward_kwargs or {}))
        closes = self.boundaries(calc_entropy_from_logits(logits), lens)

        # the segment of a position: how many have been closed before it; what follows the last one is counted as nothing
        segment = closes.cumsum(dim=-1) - closes.long()
        counts = closes.sum(dim=-1)
        most = int(counts.max()) if counts.numel() else 0
        lengths = torch.zeros(batch.shape[0], most + 1, dtype=torch.long, device=seq.device)
        lengths = lengths.scatter_add_(1, segment, (segment < counts[:, None]).long())[:, :-1]
        if not return_segmented_seq:
            return lengths if seq.ndim == 2 else lengths[0]
        pieces = [
            row[: int(sizes.sum())].split(sizes[:count].tolist())
            for row, sizes, count in zip(batch, lengths, counts.tolist(), strict=True)
        ]
        return pieces if seq.ndim == 2 else pieces[0]


def reached(amounts: Float[Tensor, 'b n'], threshold: float) -> Bool[Tensor, 'b n']:
    """True where the sum of the amounts since the last such place, that one excluded, reaches the threshold.

    From each place where a sum may begin, the place where it ends is searched for; which of these places really occur is found
    by following ever longer chains of them.
    """
    rows, length = amounts.shape
    sums = F.pad(amounts.double().cumsum(dim=-1), (1, 0))
    # a sum that begins at 0 ... n ends at 0 ... n - 1, or nowhere: then the next one begins beyond the end
    # 0.1 + 0.9 is less than 1 for some numbers of single precision that are written so
    enough = threshold * (1.0 - torch.finfo(amounts.dtype).eps)
    ends = torch.searchsorted(sums[:, 1:].contiguous(), sums + enough)
    following = F.pad(ends + 1, (0, 1), value=length + 1)
    begins = torch.zeros(rows, length + 2, dtype=torch.long, device=amounts.device)
    begins[:, 0] = 1
    for _ in range(length.bit_length() + 1):
        begins = begins.scatter_reduce(1, following, begins, 'amax')
        following = following.gather(1, following)
    return begins[:, 1 : length + 1].bool()


def check_sequences(seq: Int[Tensor, '... n'], lens: Int[Tensor, ' b'] | None) -> None:
    if seq.ndim not in (1, 2) or seq.shape[-1] == 0:
        raise ValueError(f'seq must be tokens of shape (length,) or (batch, length), not empty; got {tuple(seq.shape)}')
    if lens is None:
        return
    rows = seq.shape[0] if seq.ndim == 2 else 1
    if lens.shape != (rows,):
        raise ValueError(f'lens must hold one length per row, shape ({rows},), got {tuple(lens.shape)}')
    if bool((lens < 1).any()) or bool((lens > seq.shape[-1]).any()):
        raise ValueError(f'lens must lie between 1 and the length of the sequence, {seq.shape[-1]}; got {lens.tolist()}')
