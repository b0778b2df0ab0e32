"""Beam search: the most likely continuations, several at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.prompts import GenerateError
from x_transformers.generation.sampling import Sampler, gumbel_noise
from x_transformers.tensor_types import Bool, Float, Int


@dataclass(frozen=True)
class BeamRules:
    """How hypotheses are proposed and compared.

    ``sampler`` is None for deterministic search; otherwise its filter, temperature and generator perturb the proposals
    (stochastic beams, https://arxiv.org/abs/1903.06059), while scores stay plain log probabilities. A hypothesis is ranked by
    its score divided by ``length ** length_penalty``.
    """

    beams: int
    sampler: Sampler | None = None
    eos: int | None = None
    pad: int = 0
    length_penalty: float = 0.0


@dataclass
class Beams:
    """The hypotheses (b k) that are alive: sums of log probabilities, lengths, and which have ended."""

    scores: Float[Tensor, 'b k']
    lengths: Int[Tensor, 'b k']
    finished: Bool[Tensor, 'b k']

    def ranks(self, penalty: float) -> Float[Tensor, 'b k']:
        return self.scores if penalty == 0 else self.scores / self.lengths.clamp(min=1).to(self.scores.dtype) ** penalty


@torch.no_grad()
def search(reader: Reader, tokens: Tokens, steps: int, rules: BeamRules) -> tuple[Int[Tensor, 'k b s'], Float[Tensor, 'k b']]:
    """The best ``rules.beams`` continuations of each row, best first, with their scores.

    ``tokens`` holds one row per prompt and holds one row per hypothesis afterwards. Scores are sums of log probabilities,
    divided as the length penalty says.
    """
    batch, prompt, beams = tokens.batch, tokens.length, rules.beams
    device = tokens.value.device
    if steps == 0:
        return tokens.value.new_empty((beams, batch, 0)), torch.zeros(beams, batch, device=device)
    state = Beams(
        torch.zeros(batch, 1, device=device),
        torch.zeros(batch, 1, dtype=torch.long, device=device),
        torch.zeros(batch, 1, dtype=torch.bool, device=device),
    )
    for step in range(steps):
        reader.check_length(tokens.length)
        logits = reader.read(tokens)[:, -1].unflatten(0, (batch, -1))
        if step == 0:
            _check_width(beams, logits.shape[-1], steps)
        before = logits.shape[1]
        parents, children, state = _survivors(state, logits, rules)
        rows = (torch.arange(batch, device=device)[:, None] * before + parents).flatten()
        tokens.reorder(rows)
        # while there are fewer hypotheses than beams, all that belongs to a row is repeated with it
        reader.reorder(rows, repeated_from=None if children.shape[1] == before else batch * before)
        tokens.append(children.flatten())
        if rules.eos is not None and bool(state.finished.all()):
            break
    best = tokens.part(prompt).unflatten(0, (batch, beams))
    return best.transpose(0, 1), state.ranks(rules.length_penalty).t()


def _check_width(beams: int, vocabulary: int, steps: int) -> None:
    if beams > vocabulary**steps:
        raise GenerateError(
            f'beams must be at most {vocabulary**steps}, the number of sequences of length {steps} over {vocabulary} tokens, '
            f'got {beams}.'
        )


def _survivors(state: Beams, logits: Float[Tensor, 'b k v'], rules: BeamRules) -> tuple[Tensor, Tensor, Beams]:
    """Let each hypothesis propose children and keep the best: (parents b k, children b k, the new state), best first."""
    width = min(rules.beams, logits.shape[-1])
    proposed, gains = _proposals(logits, width, rules.sampler)
    ended = state.finished.unsqueeze(-1)
    # a hypothesis that has ended has one child, the pad, at no cost
    only_child = torch.arange(width, device=logits.device) == 0
    proposed = torch.where(ended, rules.pad, proposed)
    gains = torch.where(ended, torch.where(only_child, 0.0, -torch.inf), gains)
    finished = ended.expand_as(gains)
    if rules.eos is not None:
        finished = finished | (proposed == rules.eos)
    grown = Beams(
        (state.scores.unsqueeze(-1) + gains).flatten(1),
        (state.lengths + ~state.finished).unsqueeze(-1).expand_as(gains).flatten(1),
        finished.flatten(1),
    )
    kept = grown.ranks(rules.length_penalty).topk(min(rules.beams, grown.scores.shape[1]), dim=-1).indices
    survivors = Beams(*(t.gather(1, kept) for t in (grown.scores, grown.lengths, grown.finished)))
    return kept.div(width, rounding_mode='floor'), proposed.flatten(1).gather(1, kept), survivors


def _proposals(logits: Float[Tensor, 'b k v'], width: int, sampler: Sampler | None) -> tuple[Tensor, Tensor]:
    """The children that each hypothesis proposes (b k w) and their plain log probabilities."""
    log_probs = logits.float().log_softmax(dim=-1)
    if sampler is None or sampler.temperature == 0:
        gains, proposed = log_probs.topk(width, dim=-1)
        return proposed, gains
    perturbed = sampler.filter_fn(logits, **sampler.filter_kwargs) / sampler.temperature
    perturbed = perturbed + gumbel_noise(logits, sampler.generator)
    order, proposed = perturbed.topk(width, dim=-1)
    # what the filter removed is proposed only where nothing else is left, and never survives something that is
    return proposed, log_probs.gather(-1, proposed).masked_fill(order == -torch.inf, -torch.inf)
