"""Direct preference optimization, https://arxiv.org/abs/2305.18290."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.fit import check_future, check_net
from x_transformers.flags.objectives import DPOOptions, options
from x_transformers.helpers import is_any
from x_transformers.layers.checks import is_bool, shape_of
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int

IGNORED = -100


def log_prob_from_model_and_seq(model: nn.Module, seq: Int[Tensor, 'b n']) -> Float[Tensor, 'b m']:
    """The log-probability of every token but the first, given those before it (m = n - 1)."""
    seq = token_ids(seq, 'seq')
    if seq.ndim != 2 or seq.shape[1] < 2:
        raise ValueError(f'seq must be tokens of shape (batch, length) with at least 2 of them, got {tuple(seq.shape)}')
    is_log_prob = bool(getattr(model, 'output_is_log_prob', False))
    return -token_cross_entropy(model(seq[:, :-1]), seq[:, 1:], IGNORED, is_log_prob=is_log_prob, reduction='none')


class DPO(Module):
    """Trains a policy to prefer one continuation to another, relative to a frozen copy of itself.

    Args:
        model: a causal language model, tokens ``b n`` to logits ``b n v``; the constructor copies it as the reference.
        beta: the strength of the constraint to the reference.
        pad_id: without sequence masks, all ids except this one count as text.
        select_by_target: which log-probabilities of a response count. False, as in the original: those predicted *from*
            response tokens, which excludes the first response token and includes a first pad. True: those *of* response
            tokens.
        reduction: 'mean' over a response's tokens, as in the original, or the paper's 'sum'.
        allow_future: also train a model whose tokens attend to later tokens, such as an ``Encoder``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        pad_id: int | None = None,
        select_by_target: bool = False,
        reduction: str = 'mean',
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        options(DPOOptions, 'DPO', locals())
        check_net(model, 'DPO', name='model', told_nothing=True)
        self.policy_model = model
        self.ref_model = deepcopy(model).requires_grad_(False)
        self.beta = beta
        self.pad_id = pad_id
        self.select_by_target = select_by_target
        self.reduction = reduction
        self.allow_future = allow_future

    def init_own(self) -> None:
        """Initialize the reference as a copy of the policy."""
        self.ref_model.load_state_dict(self.policy_model.state_dict())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The policy's parameters only, for an optimizer."""
        return self.policy_model.parameters(recurse)

    def score(self, model: nn.Module, seq: Int[Tensor, 'b n'], chosen: Bool[Tensor, 'b m']) -> Float[Tensor, 'b']:
        """The log-probability of a response under a model, mean or sum over the chosen predictions (m = n - 1)."""
        is_log_prob = bool(getattr(model, 'output_is_log_prob', False))
        seq = self.readable(seq)
        targets = seq[:, 1:].masked_fill(~chosen, IGNORED)
        logits = model(seq)[:, :-1]
        losses = token_cross_entropy(logits, targets, IGNORED, is_log_prob=is_log_prob, reduction='none')
        total = -losses.sum(dim=-1)
        return total if self.reduction == 'sum' else total / chosen.sum(dim=-1).clamp(min=1e-5)

    def readable(self, seq: Int[Tensor, 'b n']) -> Int[Tensor, 'b n']:
        """A ``pad_id`` that is no token, such as -1, cannot be looked up; it is read as token 0."""
        return seq if self.pad_id is None or self.pad_id >= 0 else seq.masked_fill(seq == self.pad_id, 0)

    def predictions(self, mask: Bool[Tensor, 'b k'], seq: Int[Tensor, 'b n']) -> Bool[Tensor, 'b m']:
        """A mask over tokens as one over the predictions; one that is a token short is over predictions already."""
        if mask.shape[1] < seq.shape[1]:
            return mask
        return mask[:, 1:] if self.select_by_target else mask[:, :-1]

    def forward(
        self,
        preferred_seq: Int[Tensor, 'b n'],
        unpreferred_seq: Int[Tensor, 'b n'],
        *,
        prompt_mask: Bool[Tensor, 'b m'],
        preferred_seq_mask: Bool[Tensor, 'b n'] | None = None,
        unpreferred_seq_mask: Bool[Tensor, 'b n'] | None = None,
    ) -> Float[Tensor, '']:
        """The loss. Both sequences begin with the prompt, where ``prompt_mask`` is True; masks are True at text.

        Masks are over the tokens ``b n``, or over the predictions ``b (n - 1)``.
        """
        preferred_seq = token_ids(preferred_seq, 'preferred_seq')
        unpreferred_seq = token_ids(unpreferred_seq, 'unpreferred_seq')
        check_preference_pair(preferred_seq, unpreferred_seq)
        check_future(self.policy_model, {}, 'DPO', allowed=self.allow_future)
        if self.pad_id is not None:
            preferred_seq_mask = preferred_seq != self.pad_id if preferred_seq_mask is None else preferred_seq_mask
            unpreferred_seq_mask = unpreferred_seq != self.pad_id if unpreferred_seq_mask is None else unpreferred_seq_mask
        check_sequence_mask('prompt_mask', prompt_mask, preferred_seq)
        check_sequence_mask('preferred_seq_mask', preferred_seq_mask, preferred_seq)
        check_sequence_mask('unpreferred_seq_mask', unpreferred_seq_mask, unpreferred_seq)
        self.ref_model.eval()
        gained = self.gain(preferred_seq, prompt_mask, preferred_seq_mask)
        lost = self.gain(unpreferred_seq, prompt_mask, unpreferred_seq_mask)
        return -F.logsigmoid(self.beta * (gained - lost)).mean()

    def gain(
        self, seq: Int[Tensor, 'b n'], prompt_mask: Bool[Tensor, 'b k'], seq_mask: Bool[Tensor, 'b m'] | None
    ) -> Float[Tensor, 'b']:
        """How much likelier a response is to the policy than to the reference."""
        chosen = ~self.predictions(prompt_mask, seq)
        if seq_mask is not None:
            chosen = chosen & self.predictions(seq_mask, seq)
        with torch.no_grad():
            reference = self.score(self.ref_model, seq, chosen)
        return self.score(self.policy_model, seq, chosen) - reference


def check_preference_pair(preferred: Int[Tensor, 'b n'], unpreferred: Int[Tensor, 'b n']) -> None:
    if preferred.ndim != 2 or preferred.shape != unpreferred.shape or preferred.shape[1] < 2:
        raise ValueError(
            'preferred_seq and unpreferred_seq must both be tokens of shape (batch, length), padded to one length of at least '
            f'2; got {tuple(preferred.shape)} and {tuple(unpreferred.shape)}'
        )


def check_sequence_mask(name: str, mask: Bool[Tensor, 'b t'] | None, seq: Int[Tensor, 'b n']) -> None:
    rows, length = seq.shape
    if mask is not None and (not is_bool(mask, 2) or mask.shape[0] != rows or not is_any(mask.shape[1], length, length - 1)):
        raise ValueError(
            f'{name} must be boolean over the tokens, ({rows}, {length}), or over what is predicted, ({rows}, {length - 1}); '
            f'got {shape_of(mask)}'
        )
