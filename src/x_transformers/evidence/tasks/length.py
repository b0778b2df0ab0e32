"""Length generalization: training on short rows, testing on longer ones (https://arxiv.org/abs/2207.02098, 2305.19466)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.model import IGNORE, Batch, measure
from x_transformers.evidence.tasks.base import SequenceTask
from x_transformers.tensor_types import Int


@dataclass(frozen=True, kw_only=True)
class LengthTask(SequenceTask):
    """A question of n symbols, "=", an answer: the answer is asked for token by token.

    n is uniform from 1 to ``trained`` in training, and from ``trained + 1`` to ``tested`` in tests. ``accuracy`` is that of
    tests, per token; ``exact`` counts rows without a mistake, which are those that greedy decoding answers right;
    ``accuracy_inside`` is the accuracy at the lengths of training. With ``random_positions`` the positions of each batch are a
    sorted random subset of so many (https://arxiv.org/abs/2305.16843).
    """

    flags: ClassVar[Mapping[str, Any]] = {'dim': 64, 'depth': 3, 'heads': 4, 'attn_dim_head': 16}

    trained: int = 20
    tested: int = 40
    random_positions: int = 0
    steps: int = 3000
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not 1 <= self.trained < self.tested:
            raise ValueError(
                f'tested must be greater than trained, and trained at least 1, got trained={self.trained}, '
                f'tested={self.tested}. Test longer rows.'
            )
        if self.random_positions and self.random_positions < self.total:
            raise ValueError(
                f'random_positions must be at least the longest row, {self.total}, got {self.random_positions}. Take 2048.'
            )

    # what a subclass says

    symbols: ClassVar[int] = 2
    """Number of symbols of questions and answers."""

    @abstractmethod
    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        """(answers (b m), their sizes (b)) for questions (b n) of ``sizes``; what stands behind a size has no meaning."""

    def answer_size(self, size: int) -> int:
        """The longest answer to a question of ``size`` symbols."""
        return 1

    def questions(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Int[Tensor, 'b n']:
        return draws.whole(0, self.symbols - 1, len(sizes), longest)

    # the rest follows

    @property
    def num_tokens(self) -> int:
        """The symbols, "=", and what fills up rows."""
        return self.symbols + 2

    @property
    def total(self) -> int:
        return self.tested + self.answer_size(self.tested)

    @property
    def longest(self) -> int:
        return max(self.total, self.random_positions)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        low, high = (self.trained + 1, self.tested) if test else (1, self.trained)
        return self.rows_of(draws, draws.whole(low, high, count), high)

    def rows_of(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Batch:
        question = self.questions(draws, sizes, longest)
        answer, answer_sizes = self.solve(question, sizes, draws)
        equals, fill = self.symbols, self.symbols + 1
        length = longest + self.answer_size(longest)
        place = torch.arange(length)
        size, answer_size = sizes[:, None], answer_sizes[:, None]
        padded = torch.nn.functional.pad(question, (0, length - question.shape[1]))
        inputs = padded.where(place < size, fill)
        inputs = inputs.where(place != size, equals)
        # the answer without its last token is read after "=", and asked for one place earlier
        offset = (place - size).clamp(0, answer.shape[1] - 1)
        asked = (place >= size) & (place < size + answer_size)
        targets = answer.gather(1, offset).where(asked, IGNORE)
        told = asked.roll(1, dims=1)
        told[:, 0] = False
        inputs = targets.roll(1, dims=1).where(told & (place > size), inputs)
        inputs = inputs.where(place < size + answer_size, fill)
        return Batch(inputs, targets, self.positions(draws, length))

    def positions(self, draws: Draws, length: int) -> Tensor | None:
        if not self.random_positions:
            return None
        return draws.subsets(1, self.random_positions, length)[0].sort().values

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inside = self.rows(Draws(self.name, 'test inside'), max(1, self.test_rows // 4))
        return measure(model, self.test()) | {'accuracy_inside': measure(model, inside)['accuracy']}


@dataclass(frozen=True, kw_only=True)
class Parity(LengthTask):
    """Whether the number of ones is odd."""

    name: ClassVar[str] = 'length/parity'

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        return (inside(question, sizes).sum(dim=-1, keepdim=True) % 2), torch.ones_like(sizes)


def inside(question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b']) -> Int[Tensor, 'b n']:
    """The questions with zeros behind their ends."""
    return question * (torch.arange(question.shape[1]) < sizes[:, None])


@dataclass(frozen=True, kw_only=True)
class EvenPairs(LengthTask):
    """Whether the numbers of "01" and "10" sum to an even number, which is whether the first symbol equals the last."""

    name: ClassVar[str] = 'length/even-pairs'

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        last = question.gather(1, sizes[:, None] - 1)
        return (question[:, :1] == last).long(), torch.ones_like(sizes)


@dataclass(frozen=True, kw_only=True)
class Cycle(LengthTask):
    """Where a walk on a circle of five ends: symbols stay (0), step forward (1) or back (2)."""

    name: ClassVar[str] = 'length/cycle'
    symbols: ClassVar[int] = 5

    def questions(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Int[Tensor, 'b n']:
        return draws.whole(0, 2, len(sizes), longest)

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        moves = torch.tensor([0, 1, -1])[question]
        return inside(moves, sizes).sum(dim=-1, keepdim=True) % 5, torch.ones_like(sizes)


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(LengthTask):
    """Numbers below five with + (5), - (6) and * (7) between them; products first, the result modulo five.

    A question of size n has the largest odd number of symbols up to n.
    """

    name: ClassVar[str] = 'length/modular'
    symbols: ClassVar[int] = 8

    def questions(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Int[Tensor, 'b n']:
        question = draws.whole(0, 4, len(sizes), longest)
        question[:, 1::2] = draws.whole(5, 7, len(sizes), longest // 2)
        return question

    def rows_of(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Batch:
        return super().rows_of(draws, sizes - (sizes % 2 == 0).long(), longest)

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        total, product = torch.zeros_like(sizes), question[:, 0]
        for place in range(1, question.shape[1] - 1, 2):
            operator, number = question[:, place], question[:, place + 1]
            there = place + 1 < sizes
            times = operator == 7
            signed = number * torch.where(operator == 6, -1, 1)
            total = torch.where(there & ~times, (total + product) % 5, total)
            product = torch.where(there, torch.where(times, product * number, signed) % 5, product)
        return ((total + product) % 5)[:, None], torch.ones_like(sizes)


@dataclass(frozen=True, kw_only=True)
class Copy(LengthTask):
    """The question again."""

    name: ClassVar[str] = 'length/copy'
    symbols: ClassVar[int] = 10

    def answer_size(self, size: int) -> int:
        return size

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        return question, sizes


@dataclass(frozen=True, kw_only=True)
class Reverse(Copy):
    """The question from its end."""

    name: ClassVar[str] = 'length/reverse'

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        place = (sizes[:, None] - 1 - torch.arange(question.shape[1])).clamp_min(0)
        return question.gather(1, place), sizes


@dataclass(frozen=True, kw_only=True)
class Duplicate(Copy):
    """The question twice."""

    name: ClassVar[str] = 'length/duplicate'

    def answer_size(self, size: int) -> int:
        return 2 * size

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        place = torch.arange(2 * question.shape[1]) % sizes[:, None]
        return question.gather(1, place), 2 * sizes


@dataclass(frozen=True, kw_only=True)
class Sort(Copy):
    """The symbols of the question from the smallest to the largest."""

    name: ClassVar[str] = 'length/sort'

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        beyond = torch.arange(question.shape[1]) >= sizes[:, None]
        return question.masked_fill(beyond, self.symbols).sort(dim=-1).values.clamp_max(self.symbols - 1), sizes


@dataclass(frozen=True, kw_only=True)
class Addition(LengthTask):
    """Two numbers with "+" (10) between them, the lowest digit first; the sum, lowest digit first, with its carry.

    A question of size n has two numbers of (n - 1) // 2 digits, at least one.
    """

    name: ClassVar[str] = 'length/addition'
    symbols: ClassVar[int] = 11

    def answer_size(self, size: int) -> int:
        return self.digits(size) + 1

    @staticmethod
    def digits(size: int) -> int:
        return max(1, (size - 1) // 2)

    @property
    def total(self) -> int:
        return max(3, self.tested) + self.answer_size(self.tested)

    def rows_of(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Batch:
        return super().rows_of(draws, 2 * ((sizes - 1) // 2).clamp_min(1) + 1, max(3, longest))

    def questions(self, draws: Draws, sizes: Int[Tensor, ' b'], longest: int) -> Int[Tensor, 'b n']:
        question = draws.whole(0, 9, len(sizes), longest)
        return question.scatter(1, (sizes[:, None] - 1) // 2, 10)

    def solve(
        self, question: Int[Tensor, 'b n'], sizes: Int[Tensor, ' b'], draws: Draws
    ) -> tuple[Int[Tensor, 'b m'], Int[Tensor, ' b']]:
        digits = (sizes - 1) // 2
        wide = self.digits(question.shape[1])
        answer, carry = question.new_zeros(len(sizes), wide + 1), torch.zeros_like(sizes)
        for place in range(wide + 1):
            there = place < digits
            first = question[:, min(place, question.shape[1] - 1)]
            second = question.gather(1, (digits + 1 + place).clamp_max(question.shape[1] - 1)[:, None])[:, 0]
            total = torch.where(there, first + second, 0) + carry
            answer[:, place] = total % 10
            carry = torch.where(there, total // 10, 0)
        return answer, digits + 1
