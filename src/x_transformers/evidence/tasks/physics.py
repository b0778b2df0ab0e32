"""Reasoning in depth: successors on a cycle, and nested arithmetic (https://arxiv.org/abs/2512.17351)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.model import IGNORE, Batch
from x_transformers.evidence.tasks.base import SequenceTask, ignored
from x_transformers.tensor_types import Bool, Int


@dataclass(frozen=True, kw_only=True)
class Depo(SequenceTask):
    """One random cycle of n words as n edges "v w" in random order, then questions "<k> v" for the k-th successor of v.

    In training n is from 3 to ``words`` with weight 1 / (n + sqrt(words)) and k uniform from 1 to ``hops``; in tests n is
    ``words`` and k a power of two. Words are 1 ... words, "<k>" is words + k; 0 fills up rows.
    """

    name: ClassVar[str] = 'depo'
    flags: ClassVar[Mapping[str, Any]] = {'dim': 128, 'depth': 4, 'heads': 4, 'attn_dim_head': 32, 'rotary_pos_emb': True}

    words: int = 24
    hops: int = 4
    questions: int = 10
    steps: int = 6000
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.words < 3 or self.hops < 1 or self.questions < 1:
            raise ValueError(
                f'words must be at least 3, hops and questions at least 1, got words={self.words}, hops={self.hops}, '
                f'questions={self.questions}. Take larger numbers.'
            )

    @property
    def num_tokens(self) -> int:
        return self.words + self.hops + 1

    @property
    def longest(self) -> int:
        return 2 * self.words + 3 * self.questions

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        sizes = self.sizes(draws, count, test)
        number, many = self.words, self.questions
        beyond = torch.arange(number) >= sizes[:, None]
        # the cycle visits the first n of these words in order, and returns
        cycle = draws.orders(count, number) + 1
        after = cycle.gather(1, (torch.arange(number) + 1).where(torch.arange(number) + 1 < sizes[:, None], 0))
        order = draws.uniform(count, number).masked_fill(beyond, 2.0).argsort(dim=-1)
        edges = torch.stack((cycle.gather(1, order), after.gather(1, order)), dim=-1).flatten(1)

        if test:
            powers = torch.tensor([2**i for i in range(int(math.log2(self.hops)) + 1)])
            hops = powers[draws.whole(0, len(powers) - 1, count, many)]
        else:
            hops = draws.whole(1, self.hops, count, many)
        start = (draws.uniform(count, many) * sizes[:, None]).long()
        asked = cycle.gather(1, start)
        answer = cycle.gather(1, (start + hops) % sizes[:, None])
        questions = torch.stack((number + hops, asked, answer), dim=-1).flatten(1)

        inputs = torch.zeros(count, self.longest + 2 * number, dtype=torch.long)
        inputs[:, : 2 * number] = edges
        first = 2 * sizes[:, None]
        inputs.scatter_(1, first + torch.arange(3 * many), questions)
        inputs = inputs[:, : self.longest]
        place = torch.arange(self.longest)
        inputs = inputs.where(place < first + 3 * many, 0)
        targets = ignored(count, self.longest).scatter_(1, first + 1 + 3 * torch.arange(many), answer)
        return Batch(inputs, targets)

    def sizes(self, draws: Draws, count: int, test: bool) -> Tensor:
        if test:
            return torch.full((count,), self.words)
        choices = torch.arange(3, self.words + 1)
        share = (1.0 / (choices + math.sqrt(self.words))).cumsum(0)
        return choices[torch.searchsorted(share, draws.uniform(count) * share[-1]).clamp_max(len(choices) - 1)]


@dataclass(frozen=True, kw_only=True)
class Mano(SequenceTask):
    """Prefix expressions of +, - and * modulo ``modulus`` with up to ``operators`` operators, and their values.

    A row is "<l>", the expression of l operators, "=". Every shape of expression is equally likely. Tests have ``operators``.
    """

    name: ClassVar[str] = 'mano'
    flags: ClassVar[Mapping[str, Any]] = {'dim': 128, 'depth': 4, 'heads': 4, 'attn_dim_head': 32, 'rotary_pos_emb': True}

    operators: int = 4
    modulus: int = 23
    steps: int = 6000
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.operators < 1 or self.modulus < 2:
            raise ValueError(
                f'operators must be at least 1 and modulus at least 2, got operators={self.operators}, '
                f'modulus={self.modulus}. Take larger numbers.'
            )

    @property
    def num_tokens(self) -> int:
        """Numbers, the three operators, "=", "<l>", and what fills up rows."""
        return self.modulus + 3 + 1 + self.operators + 1

    @property
    def longest(self) -> int:
        return 2 * self.operators + 3

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        most = self.operators
        sizes = torch.full((count,), most) if test else draws.whole(1, most, count)
        length = 2 * most + 1
        here = 2 * sizes[:, None] + 1
        place = torch.arange(length)
        # l operators and l + 1 numbers in random order: exactly one rotation of such a row is an expression
        shuffled = draws.uniform(count, length).masked_fill(place >= here, 2.0).argsort(dim=-1)
        operator = shuffled < sizes[:, None]
        height = torch.where(operator, 1, -1).where(place < here, 0).cumsum(dim=-1)
        turn = height.masked_fill(place >= here, length).argmin(dim=-1, keepdim=True) + 1
        operator = operator.gather(1, (place + turn) % here) & (place < here)
        numbers = draws.whole(0, self.modulus - 1, count, length)
        kinds = draws.whole(0, 2, count, length)
        tokens = torch.where(operator, self.modulus + kinds, numbers)
        value = evaluate_prefix(operator, kinds, numbers, here, self.modulus)

        equals, fill = self.modulus + 3, self.num_tokens - 1
        inputs = torch.full((count, self.longest), fill)
        inputs[:, 0] = self.modulus + 3 + sizes
        inputs[:, 1:-1] = tokens.where(place < here, fill)
        inputs.scatter_(1, here + 1, equals)
        targets = torch.full((count, self.longest), IGNORE).scatter_(1, here + 1, value[:, None])
        return Batch(inputs, targets)


def evaluate_prefix(
    operator: Bool[Tensor, 'b n'],
    kinds: Int[Tensor, 'b n'],
    numbers: Int[Tensor, 'b n'],
    here: Int[Tensor, 'b 1'],
    modulus: int,
) -> Int[Tensor, ' b']:
    """The values of expressions, read from their ends with a stack."""
    rows, length = operator.shape
    stack = torch.zeros(rows, length + 2, dtype=torch.long)
    top = torch.zeros(rows, 1, dtype=torch.long)  # number of entries
    for place in reversed(range(length)):
        there = place < here
        is_operator = operator[:, place, None]
        first = stack.gather(1, (top - 1).clamp_min(0))
        second = stack.gather(1, (top - 2).clamp_min(0))
        kind = kinds[:, place, None]
        result = torch.where(kind == 0, first + second, torch.where(kind == 1, first - second, first * second)) % modulus
        new = torch.where(is_operator, result, numbers[:, place, None])
        at = torch.where(is_operator, top - 2, top).clamp_min(0)
        stack = stack.scatter(1, at.where(there, length + 1), new)
        top = torch.where(there, at + 1, top)
    return stack[:, 0]
