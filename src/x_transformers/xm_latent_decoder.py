"""A decoder with a latent prefix: several candidates are tried, and the best one is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.embedding.ids import token_ids
from x_transformers.flags.calls import CandidatesForwardOptions, CandidatesGenerateOptions
from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.later_objectives import XMLatentOptions
from x_transformers.flags.objectives import options
from x_transformers.latent_prediction import check_parameters, masked_average
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int

Winner = Callable[..., Tensor]


def lowest_loss(losses: Float[Tensor, 'b k'], *_: Any) -> Int[Tensor, ' b']:
    """The candidate with the smallest loss."""
    return losses.argmin(dim=-1)


def jensen_shannon(logits: Float[Tensor, 'b k n v']) -> Float[Tensor, 'b n']:
    """Jensen-Shannon divergence of the candidates' distributions: entropy of their mean less the mean of their entropies."""
    log_probs = logits.log_softmax(dim=-1)
    mean = log_probs.logsumexp(dim=1) - torch.tensor(float(logits.shape[1])).log()
    return (log_probs.exp() * (log_probs - mean.unsqueeze(1))).sum(dim=-1).mean(dim=1)


class XMLatentDecoder(Module):
    """Expectation-maximization with hard choices over a latent prefix (https://arxiv.org/abs/2607.27372).

    A prefix of ``num_latents`` standard normal vectors is prepended to the tokens. In training, ``candidates`` prefixes differ
    in one slot. The loss is that of the candidate chosen by the winner function, so latents become informative.

    Args:
        net: a ``TransformerWrapper`` around a ``Decoder``.
        dim, latent_dim: width of the net's embeddings, and of the latents; a linear map joins them if they differ, or with
            ``always_latent_proj``.
        max_batch_size: run at most this many rows at a time.
        ignore_index: targets excluded from the loss.
        latent_drop_prob: in training, the probability of no prefix at all.
        repulsive_loss_weight: reward for candidates whose predictions differ (https://arxiv.org/abs/2401.00036).
        winner_fn: from (losses (b k), intermediates) to the winner's index (b); ``winner_fns``: one for each slot.

    Raises:
        ValueError: parameters out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        num_latents: int = 4,
        dim: int | None = None,
        latent_dim: int | None = None,
        candidates: int = 2,
        max_batch_size: int | None = None,
        ignore_index: int = -100,
        latent_drop_prob: float = 0.0,
        always_latent_proj: bool = False,
        repulsive_loss_weight: float = 0.0,
        winner_fn: Winner = lowest_loss,
        winner_fns: Sequence[Winner] | None = None,
    ) -> None:
        super().__init__()
        options(XMLatentOptions, 'XMLatentDecoder', locals())
        check_added_losses(net, 'XMLatentDecoder')
        check_parameters(
            'XMLatentDecoder',
            winner_fns is not None and len(winner_fns) != num_latents
            and f'winner_fns must have one function for each of the {num_latents} slots, got {len(winner_fns)}.',
        )  # fmt: skip
        self.net: Any = net
        self.dim: int = getattr(net, 'emb_dim', None) or dim or latent_dim or 0
        self.latent_dim = latent_dim or dim or self.dim
        self.num_latents, self.candidates, self.max_batch_size = num_latents, candidates, max_batch_size
        self.ignore_index = ignore_index
        self.latent_drop_prob = latent_drop_prob
        self.repulsive_loss_weight = repulsive_loss_weight
        self.winner_fn, self.winner_fns = winner_fn, winner_fns
        projects = always_latent_proj or self.latent_dim != self.dim
        self.latent_proj: nn.Module = nn.Linear(self.latent_dim, self.dim) if projects else nn.Identity()

    # ------------------------------------------------------------ latents

    def draw(self, batch: int, active: int, device: torch.device) -> Float[Tensor, 'b k n l']:
        """Candidates that share all slots but the active one."""
        shared = torch.randn(batch, 1, self.num_latents, self.latent_dim, device=device)
        latents = shared.repeat(1, self.candidates, 1, 1)
        latents[:, :, active] = torch.randn(batch, self.candidates, self.latent_dim, device=device)
        return latents

    def _slot(self, active_latent_index: int | None) -> int:
        if active_latent_index is None:
            return int(torch.randint(self.num_latents, ()))
        if not -self.num_latents <= active_latent_index < self.num_latents:
            raise ValueError(
                f'active_latent_index must name one of the {self.num_latents} slots, got {active_latent_index}. '
                f'Give 0 to {self.num_latents - 1}.'
            )
        return active_latent_index % self.num_latents

    def _checked(self, latents: Float[Tensor, 'b ... n l'], axes: int, batch: int) -> Tensor:
        wanted = (self.num_latents, self.latent_dim)
        if latents.ndim != axes or latents.shape[0] != batch or tuple(latents.shape[-2:]) != wanted:
            middle = 'candidates, ' if axes == 4 else ''
            raise ValueError(
                f'latents must have shape ({batch}, {middle}{wanted[0]}, {wanted[1]}), got {tuple(latents.shape)}.'
            )
        return latents

    def _winner(self, slot: int) -> Winner:
        return self.winner_fn if self.winner_fns is None else self.winner_fns[slot]

    # ------------------------------------------------------------ training

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        latents: Float[Tensor, 'b k n l'] | None = None,
        return_loss: bool = True,
        active_latent_index: int | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the winners; without ``return_loss`` (logits (b k n v), latents (b k n l)).

        ``mask`` is True for tokens; padding is neither attended to nor predicted. Further keywords go to the net.
        """
        keywords = {'return_loss': return_loss, 'active_latent_index': active_latent_index}
        options(CandidatesForwardOptions, 'XMLatentDecoder', keywords)
        if x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f'x must be token ids (batch, at least two tokens), got shape {tuple(x.shape)}.')
        x = token_ids(x)
        valid = x != self.ignore_index if mask is None else (x != self.ignore_index) & mask
        inputs = x.masked_fill(x == self.ignore_index, 0)
        if return_loss and latents is None and self.training and float(torch.rand(())) < self.latent_drop_prob:
            return self._token_losses(self.net(inputs, mask=mask, **kwargs), x, valid).mean()
        slot = self._slot(active_latent_index)
        latents = self.draw(x.shape[0], slot, x.device) if latents is None else self._checked(latents, 4, x.shape[0])
        logits, intermediates = self._candidates(inputs, latents, mask, kwargs)
        if not return_loss:
            return logits, latents
        count = latents.shape[1]
        losses = self._token_losses(logits.flatten(0, 1), *(t.repeat_interleave(count, dim=0) for t in (x, valid)))
        losses = losses.view(x.shape[0], count)
        winner = self._winner(slot)(losses.detach(), intermediates).unsqueeze(-1)
        loss = losses.gather(-1, winner).mean()
        if self.repulsive_loss_weight:
            apart = jensen_shannon(logits[:, :, :-1])
            loss = loss - self.repulsive_loss_weight * masked_average(apart, valid[:, 1:])
        return loss

    def _token_losses(
        self, logits: Float[Tensor, 'b n v'], x: Int[Tensor, 'b n'], valid: Bool[Tensor, 'b n']
    ) -> Float[Tensor, ' b']:
        """The mean loss of each row over its targets that count."""
        targets = x.masked_fill(~valid, self.ignore_index)[:, 1:]
        losses = token_cross_entropy(logits[:, :-1], targets, ignore_index=self.ignore_index, reduction='none')
        return losses.sum(dim=-1) / valid[:, 1:].sum(dim=-1).clamp(min=1)

    def _candidates(
        self, x: Int[Tensor, 'b n'], latents: Float[Tensor, 'b k n l'], mask: Bool[Tensor, 'b n'] | None, kwargs: dict[str, Any]
    ) -> tuple[Float[Tensor, 'b k n v'], list[Any]]:
        """The logits of every candidate, at the tokens, and the net's intermediates of each group of rows."""
        batch, count = latents.shape[:2]
        rows = x.repeat_interleave(count, dim=0)
        masks = None if mask is None else mask.repeat_interleave(count, dim=0)
        prefix = self.latent_proj(latents.flatten(0, 1))
        size = self.max_batch_size or rows.shape[0]
        parts, records = [], []
        for low in range(0, rows.shape[0], size):
            here = slice(low, low + size)
            keywords = {name: _rows(value, batch, count, here) for name, value in kwargs.items()}
            out, record = self.net(
                rows[here],
                prepend_embeds=prefix[here],
                mask=None if masks is None else masks[here],
                return_intermediates=True,
                **keywords,
            )
            parts.append(out[:, self.num_latents :])
            records.append(record)
        return torch.cat(parts).unflatten(0, (batch, count)), records

    # ------------------------------------------------------------ generation

    def _prefix(self, latents: Float[Tensor, 'b n l'] | None, batch: int, device: torch.device) -> Float[Tensor, 'b n d']:
        if latents is None:
            latents = torch.randn(batch, self.num_latents, self.latent_dim, device=device)
        prefix: Tensor = self.latent_proj(self._checked(latents, 3, batch))
        return prefix

    @torch.no_grad()
    def generate(
        self, start_tokens: Int[Tensor, 'b n'], seq_len: int, latents: Float[Tensor, 'b n l'] | None = None, **kwargs: Any
    ) -> Int[Tensor, 'b s']:
        """Tokens behind the prompt, as ``AutoregressiveWrapper.generate`` makes them, with a prefix given or drawn."""
        prefix = self._prefix(latents, start_tokens.shape[0], start_tokens.device)
        writer = AutoregressiveWrapper(self.net, ignore_index=self.ignore_index)
        generated: Tensor = writer.generate(start_tokens, seq_len, prepend_embeds=prefix, **kwargs)
        return generated

    @torch.no_grad()
    def generate_with_candidate_latents(
        self,
        start_tokens: Int[Tensor, 'b n'],
        seq_len: int,
        winner_fn: Winner | None = None,
        winner_fns: Sequence[Winner] | None = None,
        active_latent_index: int | None = None,
        return_best_latents: bool = False,
        net_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``generate``, with latents chosen among ``candidates`` by what they make of the prompt.

        Args:
            winner_fn: from the candidates' logits (b k n v) to an index (b); by default the candidate that predicts the prompt
                best wins. ``winner_fns``: one for each slot.
            active_latent_index: choose this slot only; by default all slots are chosen, one after the other.
            return_best_latents: return (tokens, latents (b n l)).
            net_kwargs: keywords for the net while candidates are compared; all others go to ``generate``.
        """
        options(CandidatesGenerateOptions, 'generate_with_candidate_latents', locals())
        slots = range(self.num_latents) if active_latent_index is None else [self._slot(active_latent_index)]
        if winner_fns is not None and len(winner_fns) != len(slots):
            raise ValueError(f'winner_fns must have one function for each of the {len(slots)} slots, got {len(winner_fns)}.')
        batch, device = start_tokens.shape[0], start_tokens.device
        best = torch.randn(batch, self.num_latents, self.latent_dim, device=device)

        def predicts_best(logits: Float[Tensor, 'b k n v']) -> Int[Tensor, ' b']:
            count = logits.shape[1]
            repeated = start_tokens.repeat_interleave(count, dim=0)
            losses = self._token_losses(logits.flatten(0, 1), repeated, torch.ones_like(repeated, dtype=torch.bool))
            return losses.view(batch, count).argmin(dim=-1)

        for nth, slot in enumerate(slots):
            candidates = best.unsqueeze(1).repeat(1, self.candidates, 1, 1)
            candidates[:, 1:, slot] = torch.randn(batch, self.candidates - 1, self.latent_dim, device=device)
            logits, _ = self._candidates(start_tokens, candidates, None, net_kwargs or {})
            choose = winner_fns[nth] if winner_fns is not None else winner_fn or predicts_best
            index = choose(logits)
            best = candidates[torch.arange(batch, device=device), index]
        generated = self.generate(start_tokens, seq_len, latents=best, **{**(net_kwargs or {}), **kwargs})
        return (generated, best) if return_best_latents else generated


def _rows(value: Any, batch: int, count: int, here: slice) -> Any:
    """A keyword with one entry per batch row, for the candidates of some rows."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value.repeat_interleave(count, dim=0)[here]
    return value
