"""Losses and metrics over logits: token cross entropy (also without holding all logits), z-loss, entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from x_transformers.attention.mask import PackedSequences
from x_transformers.helpers import autocast_dtype, is_any, log, masked_mean, without_autocast
from x_transformers.tensor_types import Bool, Float, Int

__all__ = ['calc_entropy', 'calc_z_loss', 'linear_cross_entropy', 'masked_mean', 'shifted_mask', 'token_cross_entropy']

CHUNK_CPU = 256
CHUNK_ACCELERATOR = 2048


def token_cross_entropy(
    logits: Float[Tensor, '... v'],
    targets: Int[Tensor, '...'],
    ignore_index: int = -100,
    is_log_prob: bool = False,
    reduction: str = 'mean',
) -> Float[Tensor, '...']:
    """Cross entropy of every token that is not ``ignore_index``, in single precision at least.

    The classes stay on the last, contiguous axis: with the classes on axis 1 the softmax walks memory in strides, which takes
    nearly twice the time on CPU.

    Args:
        logits: scores, or log probabilities with ``is_log_prob``.
        targets: class indices, one per row of logits.
        reduction: ``'mean'`` over the tokens that count (NaN if none does), ``'sum'``, or ``'none'`` (the shape of ``targets``,
            0 where ignored).
    """
    check_targets('token_cross_entropy', logits, targets, 'logits')
    flat, wanted = at_least_single(logits).reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    measure = F.nll_loss if is_log_prob else F.cross_entropy
    try:
        loss = measure(flat, wanted, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        raise beyond_logits('token_cross_entropy', wanted[wanted != ignore_index], flat.shape[-1], ignore_index) from None
    return loss.view(targets.shape) if reduction == 'none' else loss


def at_least_single(t: Float[Tensor, '...']) -> Tensor:
    """``t`` in float32 if it is in half precision, in which logarithms and means of many numbers go wrong."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def rows_at_once(device: torch.device) -> int:
    """How many rows of logits exist at one time, where the caller leaves it open."""
    return CHUNK_CPU if device.type == 'cpu' else CHUNK_ACCELERATOR


def shifted_mask(
    mask: Bool[Tensor, 'b n'] | None, length: int
) -> tuple[Bool[Tensor, 'b m'] | None, Bool[Tensor, 'b m'] | None]:
    """(which of the first ``length - 1`` positions count as inputs, which of the last as targets).

    A mask over the inputs only, ``length - 1`` wide, says nothing of the last target: then the second is None.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f'mask must be a boolean tensor (True: counts), got a {type(mask).__name__}')
    if mask.dtype != torch.bool:
        raise TypeError(f'mask must be boolean (True: counts), got {mask.dtype}. Use mask.bool() if 1 means True.')
    if mask.ndim != 2 or not is_any(mask.shape[1], length, length - 1):
        raise ValueError(
            f'mask must cover the {length} positions of each row, or the {length - 1} that are inputs; got {tuple(mask.shape)}'
        )
    return (mask[:, :-1], mask[:, 1:]) if mask.shape[1] == length else (mask, None)


def next_embedding_loss(
    predicted: Float[Tensor, 'b n d'], embedded: Float[Tensor, 'b n d'], counts: Bool[Tensor, 'b m']
) -> Float[Tensor, '']:
    """Mean absolute distance of predicted embeddings from those of the next token, at the positions that count."""
    distance = (predicted[:, :-1] - embedded[:, 1:].detach()).abs().mean(dim=-1)
    return distance.masked_fill(~counts, 0.0).sum() / counts.sum()


def check_targets(where: str, rows: Float[Tensor, '... d'], targets: Int[Tensor, '...'], name: str) -> None:
    if rows.shape[:-1] != targets.shape:
        raise ValueError(
            f'{where}: targets must hold one target for each row of {name}, got {tuple(targets.shape)} for {name} of shape '
            f'{tuple(rows.shape)}. Pass as many.'
        )


def beyond_logits(where: str, targets: Int[Tensor, ' n'], classes: int, ignore_index: int) -> IndexError:
    """What to say of targets for which there are no logits."""
    return IndexError(
        f'{where}: targets must lie in 0 … {classes - 1}, as there are logits of {classes} tokens, or be '
        f'ignore_index={ignore_index}, but they range from {int(targets.min())} to {int(targets.max())}.'
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross entropies of ``hidden @ weight.T + bias``, ``chunk`` rows at a time.

    The gradients are made in the forward, while a chunk's logits are there; the backward multiplies them by what comes in.
    Hence nothing of the size rows x classes outlives its chunk, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, 'n d'],
        weight: Float[Tensor, 'v d'],
        bias: Float[Tensor, ' v'] | None,
        targets: Int[Tensor, ' n'],
        shares: Float[Tensor, ' n'],
        chunk: int,
        dtype: torch.dtype,
        with_grad: bool,
        softcap: float | None,
    ) -> Float[Tensor, '']:
        needs = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        to_hidden = torch.empty_like(hidden) if needs[0] else None
        to_weight = torch.zeros_like(weight) if needs[1] else None
        to_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
        total = shares.new_zeros(())
        logits_of = Logits(matrix, offset, min(chunk, hidden.shape[0]), shares.dtype, softcap)
        for start in range(0, hidden.shape[0], chunk):
            here = slice(start, start + chunk)
            rows, wanted, share = hidden[here].to(dtype), targets[here].unsqueeze(-1), shares[here].unsqueeze(-1)
            log_probs, bend = logits_of.log_softmax(rows)
            total -= (log_probs.gather(-1, wanted) * share).sum()
            if not any(needs):
                continue
            # the slope of a token's loss in its logits: probabilities, minus one at the target
            slope = log_probs.exp_()
            slope = slope.scatter_add_(-1, wanted, slope.new_full((), -1.0).expand(wanted.shape))
            slope = (slope if bend is None else slope.mul_(bend)).to(dtype)
            # each token's share is put on what is narrow
            if to_hidden is not None:
                to_hidden[here] = (slope @ matrix).mul_(share)
            if to_weight is not None:
                _add_product(to_weight, slope.t(), (rows * share).to(dtype))
            if to_bias is not None:
                to_bias += slope.t() @ share.squeeze(-1).to(dtype)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, '']) -> tuple[Tensor | None, ...]:
        slopes = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*slopes, None, None, None, None, None, None)


class Logits:
    """Log probabilities of one chunk after the other, on a CPU in the same memory: new memory of this size costs time."""

    def __init__(
        self,
        matrix: Float[Tensor, 'v d'],
        offset: Float[Tensor, ' v'] | None,
        rows: int,
        dtype: torch.dtype,
        softcap: float | None = None,
    ) -> None:
        self.matrix, self.offset, self.dtype, self.softcap = matrix, offset, dtype, softcap
        reuses = matrix.device.type == 'cpu' and matrix.dtype == dtype and not torch.compiler.is_compiling()
        self.room = matrix.new_empty(rows, matrix.shape[0]) if reuses else None

    def log_softmax(self, rows: Float[Tensor, 'n d']) -> tuple[Float[Tensor, 'n v'], Float[Tensor, 'n v'] | None]:
        """(log probabilities, the slope of the soft cap at each logit if there is a cap)."""
        if self.softcap is not None:
            bent = (F.linear(rows, self.matrix, self.offset).to(self.dtype) / self.softcap).tanh_()
            return (bent * self.softcap).log_softmax(dim=-1), 1.0 - bent.square()
        return self._log_softmax(rows), None

    def _log_softmax(self, rows: Float[Tensor, 'n d']) -> Float[Tensor, 'n v']:
        if self.room is None:
            return F.linear(rows, self.matrix, self.offset).to(self.dtype).log_softmax(dim=-1)
        room = self.room[: rows.shape[0]]
        torch.mm(rows, self.matrix.t(), out=room)
        if self.offset is not None:
            room += self.offset
        return torch.log_softmax(room, -1, out=room)


def _add_product(total: Float[Tensor, 'a c'], a: Float[Tensor, 'a b'], b: Float[Tensor, 'b c']) -> None:
    """``total += a @ b``, in one pass where the dtypes agree; sums over chunks stay in the dtype of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def linear_cross_entropy(
    hidden: Float[Tensor, '... d'],
    weight: Float[Tensor, 'v d'],
    bias: Float[Tensor, ' v'] | None,
    targets: Int[Tensor, '...'],
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: str = 'mean',
    softcap: float | None = None,
) -> Float[Tensor, '']:
    """``token_cross_entropy(F.linear(hidden, weight, bias), targets)`` that never holds all logits.

    Only ``chunk`` rows of logits exist at a time, so with a large vocabulary the memory of a training step is that of the
    model, not of its logits. Loss and gradients are those of the two steps done one after the other, to rounding.

    Args:
        reduction: ``'mean'`` over the tokens that are not ``ignore_index`` (NaN if all are ignored), or ``'sum'``.
        softcap: keep the logits between minus this and this, with tanh.
    """
    check_targets('linear_cross_entropy', hidden, targets, 'hidden')
    if reduction not in ('mean', 'sum'):
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}. Use token_cross_entropy for "
            'single losses.'
        )
    if chunk is not None and chunk < 1:
        raise ValueError(
            f'linear_cross_entropy: chunk must be at least 1, the rows computed at a time, got {chunk}. Give a larger one.'
        )
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = autocast_dtype(rows) or weight.dtype
    counted = wanted != ignore_index
    shares = counted.to(torch.promote_types(dtype, torch.float32))
    count = shares.sum()
    if reduction == 'mean':
        shares = shares / count.clamp(min=1)
    size = chunk or rows_at_once(rows.device)
    with without_autocast(rows):
        try:
            loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                rows, weight, bias, wanted.masked_fill(~counted, 0), shares, size, dtype, torch.is_grad_enabled(), softcap
            )
        except RuntimeError as error:
            if not str(error).startswith('index'):
                raise
            raise beyond_logits('linear_cross_entropy', wanted[counted], weight.shape[0], ignore_index) from None
    # as for ordinary cross entropy: the mean of no tokens is not a number
    return torch.where(count > 0, loss, torch.nan) if reduction == 'mean' else loss


def calc_entropy(t: Float[Tensor, '... v'], is_prob: bool = False) -> Float[Tensor, '...']:
    """Entropy over the last axis, in nats, of logits or of probabilities."""
    t = at_least_single(t)
    probs = t if is_prob else t.softmax(dim=-1)
    return -(probs * log(probs)).sum(dim=-1)


def calc_z_loss(
    pre_softmax_attns: Sequence[Float[Tensor, 'b h i j']], mask: Bool[Tensor, 'b i'] | None = None, weight: float = 1.0
) -> Float[Tensor, '']:
    """Keeps attention logits small (https://arxiv.org/abs/2202.08906).

    The log-sum-exps of all layers are added up, then squared, summed over heads and averaged over the positions that ``mask``
    names (all of them without one). A position that sees no key in a layer has no scores there.
    """
    if not pre_softmax_attns:
        raise ValueError('calc_z_loss: pre_softmax_attns must hold the scores of at least one layer, got none. Pass some.')
    widths = {tuple(attn.shape[:3]) for attn in pre_softmax_attns}
    if len(widths) > 1:
        raise ValueError(
            f'calc_z_loss: pre_softmax_attns must agree in batch, heads and queries to be summed, got {sorted(widths)}. '
            'Call it for each kind.'
        )
    parts = [_log_sum_exp(attn) for attn in pre_softmax_attns]
    total, seen = parts[0]
    for part, sees in parts[1:]:
        total, seen = total + part, seen | sees
    counts = seen.any(dim=1) if mask is None else seen.any(dim=1) & mask
    kept = total.square().sum(dim=1).masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)
    return kept * weight


def _log_sum_exp(scores: Float[Tensor, 'b h i j']) -> tuple[Float[Tensor, 'b h i'], Bool[Tensor, 'b h i']]:
    """(the log-sum-exp of every row, 0 where it sees no key; which rows see one)."""
    lowest = -torch.finfo(scores.dtype).max
    # forbidden keys have the lowest finite score, or minus infinity, whose gradient would not be a number
    sums = at_least_single(scores.clamp(min=lowest)).logsumexp(dim=-1)
    sees = sums > lowest / 2
    return sums.masked_fill(~sees, 0.0), sees


def with_experts(loss: Float[Tensor, ''], seen: Any) -> Float[Tensor, '']:
    """With what experts in training add to it, if any of them ran."""
    extra: Tensor | None = getattr(seen, 'expert_loss', None)
    return loss if extra is None else loss + extra


def later_targets(targets: Int[Tensor, 'b n'], by: int, packing: Any, front: int, ignore_index: int) -> Int[Tensor, 'b n']:
    """What stands ``by`` places behind each target; nothing at the end, and in packed sequences nothing of the next one."""
    later = F.pad(targets[:, by:], (0, min(by, targets.shape[1])), value=ignore_index)
    if packing is None:
        return later
    starts = PackedSequences.of(packing).starts_q.to(targets.device).long() - front
    place = torch.arange(targets.shape[1], device=targets.device)
    # sequences that begin at a place or before it
    document, other = ((each.unsqueeze(-1) >= starts).sum(dim=-1) for each in (place, place + by))
    return later.masked_fill(document != other, ignore_index)


def later_token_loss(
    logits: Sequence[Float[Tensor, 'b n v']],
    targets: Int[Tensor, 'b n'],
    *,
    packing: Any = None,
    front: int = 0,
    ignore_index: int = -100,
    is_log_prob: bool = False,
) -> Float[Tensor, '']:
    """The mean losses of the tokens one, two, … places behind the targets, added up (https://arxiv.org/abs/2404.19737).

    Logits without any target, as of rows that are too short, add 0. ``front``: rows in front, which packing counts.
    """
    losses = []
    for by, each in enumerate(logits, 1):
        wanted = later_targets(targets, by, packing, front, ignore_index)
        total = token_cross_entropy(each, wanted, ignore_index=ignore_index, is_log_prob=is_log_prob, reduction='sum')
        losses.append(total / (wanted != ignore_index).sum().clamp(min=1))
    return torch.stack(losses).sum()


def packed_targets(x: Int[Tensor, 'b n'], packing: Any, front: int, ignore_index: int) -> Int[Tensor, 'b n']:
    """The tokens as targets: the first token of a packed sequence is not predicted from the last of the one before."""
    if packing is None:
        return x
    starts = PackedSequences.of(packing).starts_q.to(x.device).long() - front
    place = torch.arange(x.shape[1], device=x.device)
    first = (place.unsqueeze(-1) == starts[:-1]).any(dim=-1)
    return x.masked_fill(first, ignore_index)
