"""Speculative decoding: cheap drafts, verified by the net in one pass; the distribution is the net's own.

https://arxiv.org/abs/2211.17192 (a draft model), https://arxiv.org/abs/2404.19737 (heads for later tokens), and prompt look-up,
where the guess is what followed the same words before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.sampling import Sampler
from x_transformers.tensor_types import Float, Int


@dataclass
class Draft:
    """Guessed tokens (b k) and the distributions (b k v) they were drawn from; None: they were not drawn but copied."""

    tokens: Int[Tensor, 'b k']
    probs: Float[Tensor, 'b k v'] | None = None


@dataclass
class Tally:
    """How well the guessing went: passes of the net, tokens guessed and tokens accepted (per row of the batch)."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class Drafter(Protocol):
    def draft(self, tokens: Tokens, count: int) -> Draft: ...

    def settle(self, length: int) -> None:
        """Only ``length`` tokens were right."""


class ModelDrafter:
    """Guesses with a smaller model, sampled by the same rules as the net."""

    def __init__(self, reader: Reader, sampler: Sampler) -> None:
        self.reader = reader
        self.sampler = sampler
        self._mark = reader.mark()

    def draft(self, tokens: Tokens, count: int) -> Draft:
        length, probs = tokens.length, []
        for guessed in range(count):
            probs.append(self.sampler.probs(self.reader.read(tokens)[:, -1]))
            if guessed == 0:
                self._mark = self.reader.mark()
            tokens.append(self.sampler.draw(probs[-1]))
        guesses = tokens.part(length).clone()
        tokens.cut(length)
        return Draft(guesses, torch.stack(probs, dim=1) if probs else None)

    def settle(self, length: int) -> None:
        self.reader.rollback(length, self._mark)


class SelfDrafter:
    """Guesses with the net's own heads for later tokens, from what they said when the text so far was checked.

    The heads guess without each other's guesses, so they cost no pass of their own.
    """

    def __init__(self, reader: Reader, sampler: Sampler) -> None:
        reader.keeps_later = True
        self.reader = reader
        self.sampler = sampler
        self._said: list[Float[Tensor, 'b v']] = []

    def draft(self, tokens: Tokens, count: int) -> Draft:
        probs = [self.sampler.probs(logits) for logits in self._said[:count]]
        if not probs:
            return Draft(tokens.part(tokens.length))
        guesses = torch.stack([self.sampler.draw(each) for each in probs], dim=1)
        return Draft(guesses, torch.stack(probs, dim=1))

    def settle(self, length: int) -> None:
        # what stands next has been drawn from the first head; the others go on behind it
        at = length - 1 - self.reader.later_from
        self._said = [logits[:, at] for logits in self.reader.later]


class LookupDrafter:
    """Guesses that what followed the newest ``ngram`` tokens earlier in the sequence follows them again."""

    def __init__(self, ngram: int = 2) -> None:
        if ngram < 1:
            raise ValueError(f'prompt_lookup must be at least 1 token, got {ngram}')
        self.ngram = ngram

    def draft(self, tokens: Tokens, count: int) -> Draft:
        ids, n = tokens.value, self.ngram
        if count == 0 or ids.shape[1] <= n:
            return Draft(ids[:, :0])
        # every window of n tokens that has a successor; the newest that equals the end wins
        windows = ids[:, :-1].unfold(1, n, 1)
        equal = (windows == ids[:, None, -n:]).all(dim=-1)
        place = torch.arange(1, equal.shape[1] + 1, device=ids.device)
        newest = (equal * place).amax(dim=1)
        if not bool(newest.any()):
            return Draft(ids[:, :0])
        # rows without a match guess anything; the check makes any guess harmless
        after = (newest - 1).clamp(min=0) + n
        index = after[:, None] + torch.arange(count, device=ids.device)
        period = (ids.shape[1] - after)[:, None]
        wrapped = after[:, None] + (index - after[:, None]) % period
        return Draft(ids.gather(1, wrapped))

    def settle(self, length: int) -> None:
        pass


@dataclass
class Checked:
    """The outcome of one check: how many guesses all rows accept, and what comes next in each row."""

    accepted: int
    following: Int[Tensor, ' b']


def accept_guesses(draft: Draft, probs: Float[Tensor, 'b k1 v'], sampler: Sampler) -> Checked:
    """Accept guesses with probability min(1, p/q); where a row refuses, draw from what p has more than q.

    ``probs`` are the net's distributions after each guess, one more than there are guesses. The batch goes on together: it
    accepts as many guesses as its most reluctant row. What a row does up to there does not depend on the others, so each row
    is an exact sample.
    """
    count = draft.tokens.shape[1]
    rows = torch.arange(probs.shape[0], device=probs.device)
    if count == 0:
        return Checked(0, sampler.draw(probs[:, 0]))
    p = probs[:, :count].gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1)
    q = torch.ones_like(p) if draft.probs is None else draft.probs.gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1)
    chance = torch.rand(p.shape, device=p.device, dtype=p.dtype, generator=sampler.generator)
    accepts = (chance * q < p).long().cumprod(dim=1)
    taken = accepts.sum(dim=1)
    least = int(taken.min())
    if least == count:
        return Checked(count, sampler.draw(probs[:, count]))
    guessed = draft.tokens[:, least]
    if draft.probs is None:
        rest = probs[:, least].index_put((rows, guessed), probs.new_zeros(()))
    else:
        rest = (probs[:, least] - draft.probs[:, least]).clamp(min=0)
    refused = taken == least
    # rows that accept their guess do not use the rest, which may be empty for them
    rest = torch.where(refused.unsqueeze(-1), rest, probs[:, least])
    return Checked(least, torch.where(refused, sampler.draw(rest), guessed))


@torch.no_grad()
def speculate(
    reader: Reader,
    drafter: Drafter,
    tokens: Tokens,
    steps: int | None,
    sampler: Sampler,
    lookahead: int = 4,
    eos: int | None = None,
    pad: int = 0,
    tally: Tally | None = None,
) -> Iterator[Int[Tensor, ' b']]:
    """As ``decode``, with the same distribution, in fewer passes of the net."""
    if lookahead < 1:
        raise ValueError(f'lookahead must be at least 1 guess, got {lookahead}')
    tally = tally if tally is not None else Tally()
    finished = torch.zeros(tokens.batch, dtype=torch.bool, device=tokens.value.device)
    done = 0
    while steps is None or done < steps:
        reader.check_length(tokens.length)
        count = _guesses(reader, tokens.length, lookahead, None if steps is None else steps - done)
        draft = drafter.draft(tokens, count)
        length, count = tokens.length, draft.tokens.shape[1]
        mark = reader.mark()
        tokens.extend(draft.tokens)
        probs = sampler.probs(reader.read(tokens, last=count + 1))
        checked = accept_guesses(draft, probs, sampler)
        tokens.cut(length + checked.accepted)
        reader.rollback(tokens.length, mark)
        drafter.settle(tokens.length)
        tokens.append(checked.following)
        tally.passes += 1
        tally.drafted += count
        tally.accepted += checked.accepted
        for new in tokens.part(length).clone().unbind(dim=1):
            if eos is not None:
                new = new.masked_fill(finished, pad)
                finished = finished | ((new == eos) & ~finished)
            done += 1
            yield new
            if eos is not None and bool(finished.all()):
                return


def _guesses(reader: Reader, length: int, lookahead: int, left: int | None) -> int:
    """How many guesses fit in front of the window's end and of the last token that is wanted."""
    count = lookahead if left is None else min(lookahead, left - 1)
    return count if reader.limit is None else max(min(count, reader.limit - length), 0)
