"""Associative recall: many keys with a value each; some are queried later (https://arxiv.org/abs/2312.04927)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.model import IGNORE, Batch, build_token_model, build_vector_model
from x_transformers.evidence.tasks.base import SequenceTask, ignored


@dataclass(frozen=True, kw_only=True)
class Recall(SequenceTask):
    """MQAR: ``pairs`` keys with their values, then each key once more; its value is asked for.

    Keys are 1 ... vocabulary/2 - 1, values the other half. The distance g between the pairs and a question has probability
    g^(power - 1), in units of one question. Other places hold 0, or random tokens with ``random_filler``. ``mixed``: steps of
    training have ``pairs`` pairs, one less, ..., one, in turns, as published runs have several numbers; tests have ``pairs``.
    """

    name: ClassVar[str] = 'mqar'
    flags: ClassVar[Mapping[str, Any]] = {'dim': 64, 'depth': 1, 'heads': 1}

    vocabulary: int = 1024
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_filler: bool = False
    mixed: bool = True
    steps: int = 600

    def __post_init__(self) -> None:
        room = (self.length - self.prologue) // self.unit
        if self.pairs < 1 or room < self.pairs:
            raise ValueError(
                f'pairs must be at least 1 and leave room for as many questions, got pairs={self.pairs} in '
                f'length={self.length}. Take a length of {self.prologue + self.unit * max(1, self.pairs)} or more.'
            )
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(f'vocabulary must be at least {2 * self.pairs + 2}, got {self.vocabulary}. Take a larger one.')

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def longest(self) -> int:
        return self.length

    @property
    def unit(self) -> int:
        """Places of one question."""
        return 2

    @property
    def prologue(self) -> int:
        """Places that the pairs take."""
        return 2 * self.pairs

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of pairs that rows can have, the largest first."""
        return tuple(range(self.pairs, 0, -1))

    def batch(self, seed: int, step: int) -> Batch:
        counts = self.counts if self.mixed else (self.pairs,)
        rows = dataclasses.replace(self, pairs=counts[step % len(counts)])
        return rows.rows(Draws(self.name, 'train', seed, step), self.rows_per_step)

    def keys(self, draws: Draws, count: int) -> Tensor:
        return draws.subsets(count, self.vocabulary // 2 - 1, self.pairs) + 1

    def values(self, draws: Draws, *shape: int) -> Tensor:
        return draws.whole(self.vocabulary // 2, self.vocabulary - 1, *shape)

    def places(self, draws: Draws, count: int) -> Tensor:
        """Where the keys are asked for (count pairs)."""
        room = (self.length - self.prologue) // self.unit
        weights = torch.arange(1, room + 1).double().pow(self.power - 1).float()
        return self.prologue + self.unit * draws.weighted_subsets(count, weights, self.pairs)

    def filler(self, draws: Draws, count: int) -> Tensor:
        if self.random_filler:
            return draws.whole(0, self.vocabulary - 1, count, self.length)
        return torch.zeros(count, self.length, dtype=torch.long)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        keys, values = self.keys(draws, count), self.values(draws, count, self.pairs)
        places, inputs = self.places(draws, count), self.filler(draws, count)
        inputs[:, 0 : self.prologue : 2] = keys
        inputs[:, 1 : self.prologue : 2] = values
        inputs.scatter_(1, places, keys)
        return Batch(inputs, ignored(count, self.length).scatter_(1, places, values))


@dataclass(frozen=True, kw_only=True)
class Forgetting(Recall):
    """``again`` of the keys are given a second value; the last one counts."""

    name: ClassVar[str] = 'mqar/forgetting'
    again: int = 2
    steps: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.again <= self.pairs:
            raise ValueError(f'again must be from 0 to pairs={self.pairs}, got {self.again}. Give fewer keys a second value.')
        super().__post_init__()

    @property
    def prologue(self) -> int:
        return 2 * (self.pairs + self.again)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(count for count in super().counts if count >= self.again)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        keys, values = self.keys(draws, count), self.values(draws, count, self.pairs)
        chosen = draws.subsets(count, self.pairs, self.again)
        second = self.values(draws, count, self.again)
        places, inputs = self.places(draws, count), self.filler(draws, count)
        inputs[:, 0 : self.prologue : 2] = torch.cat((keys, keys.gather(1, chosen)), dim=1)
        inputs[:, 1 : self.prologue : 2] = torch.cat((values, second), dim=1)
        inputs.scatter_(1, places, keys)
        return Batch(inputs, ignored(count, self.length).scatter_(1, places, values.scatter(1, chosen, second)))


@dataclass(frozen=True, kw_only=True)
class Compositional(Recall):
    """Keys are two tokens on a square grid of ``pairs`` cells, so that neither token alone tells the value."""

    name: ClassVar[str] = 'mqar/compositional'
    length: int = 48
    steps: int = 2000

    def __post_init__(self) -> None:
        if math.isqrt(max(self.pairs, 0)) ** 2 != self.pairs:
            raise ValueError(f'pairs must be a square number, got {self.pairs}. Take 4, 9 or 16.')
        super().__post_init__()

    @property
    def unit(self) -> int:
        return 3

    @property
    def prologue(self) -> int:
        return 3 * self.pairs

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(count for count in super().counts if math.isqrt(count) ** 2 == count)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        side = math.isqrt(self.pairs)
        halves = draws.subsets(count, self.vocabulary // 2 - 1, 2 * side) + 1
        cells = draws.orders(count, self.pairs)
        first = halves.gather(1, cells // side)
        second = halves.gather(1, side + cells % side)
        values = self.values(draws, count, self.pairs)
        places, inputs = self.places(draws, count), self.filler(draws, count)
        for offset, part in enumerate((first, second, values)):
            inputs[:, offset : self.prologue : 3] = part
        inputs.scatter_(1, places, first)
        inputs.scatter_(1, places + 1, second)
        return Batch(inputs, ignored(count, self.length).scatter_(1, places + 1, values))


@dataclass(frozen=True, kw_only=True)
class Stacked(Recall):
    """A key and its value share a position: two embeddings, added."""

    name: ClassVar[str] = 'mqar/stacked'
    length: int = 32
    steps: int = 2000

    @property
    def unit(self) -> int:
        return 1

    @property
    def prologue(self) -> int:
        return self.pairs

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        keys, values = self.keys(draws, count), self.values(draws, count, self.pairs)
        places, inputs = self.places(draws, count), self.filler(draws, count)
        inputs[:, : self.pairs] = keys
        inputs.scatter_(1, places, keys)
        seconds = torch.zeros_like(inputs)
        seconds[:, : self.pairs] = values
        targets = ignored(count, self.length).scatter_(1, places, values)
        return Batch(torch.stack((inputs, seconds), dim=-1), targets)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        more = {'embed_num_tokens': {'second': self.vocabulary}}
        return build_token_model(flags, num_tokens=self.vocabulary, max_seq_len=self.length, **more)


@dataclass(frozen=True, kw_only=True)
class ContinuousRecall(Recall):
    """Keys and values are random unit vectors; the output is scored against the values of its row."""

    name: ClassVar[str] = 'mqar/continuous'
    vectors: int = 16
    steps: int = 2000

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        keys, values = (torch.nn.functional.normalize(draws.normal(count, self.pairs, self.vectors), dim=-1) for _ in range(2))
        places = self.places(draws, count)
        inputs = torch.zeros(count, self.length, self.vectors)
        inputs[:, 0 : self.prologue : 2] = keys
        inputs[:, 1 : self.prologue : 2] = values
        inputs.scatter_(1, places[:, :, None].expand_as(keys), keys)
        numbers = torch.arange(self.pairs).expand(count, -1)
        targets = torch.full((count, self.length), IGNORE).scatter_(1, places, numbers)
        return Batch(inputs, targets, values=values)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        return build_vector_model(flags, dim_in=self.vectors, dim_out=self.vectors, max_seq_len=self.length)
