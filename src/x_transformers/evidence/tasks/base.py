"""The task interface: batches that depend on seed and step only, a model for flags, and an evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.model import IGNORE, SHARES, Batch, build_token_model, measure

Direction = Literal['higher', 'lower']


class Task(ABC):
    """A question asked of models: which data, which model for which flags, how good it is.

    A task of one's own defines ``batch``, ``model`` and ``evaluate``; the class attributes say how it is trained and judged.
    Its attributes, and its source when it does not belong to this package, are part of the hash of a run.
    """

    name: ClassVar[str] = 'own'
    metric: ClassVar[str] = 'loss'
    """The key of what ``evaluate`` returns that the verdict is about."""
    better: ClassVar[Direction] = 'lower'
    version: ClassVar[int] = 1
    """Raised when the data or the evaluation of a task change, so that old results are not taken for new ones."""
    flags: ClassVar[Mapping[str, Any]] = {'dim': 64, 'depth': 2, 'heads': 1}
    """The baseline, where nothing else is asked for."""
    steps: int = 500
    lr: float = 3e-3

    @abstractmethod
    def batch(self, seed: int, step: int) -> Any:
        """The batch of one optimizer step. It must depend on ``seed`` and ``step`` alone."""

    @abstractmethod
    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        """A model whose call on a batch returns the loss to be minimized."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures on rows that are the same for every model; ``metric`` is one of them."""

    def resolution(self) -> float:
        """The smallest difference that the metric can show, such as one answer in all; 0: any."""
        return 0.0

    def metric_range(self) -> tuple[float, float]:
        """The lowest and the highest value that the metric can have. Intervals are cut there."""
        return -math.inf, math.inf

    def options(self) -> dict[str, Any]:
        """What the hash of a run is made of."""
        own = type(self)
        values: dict[str, Any] = {'task': self.name, 'version': self.version}
        if dataclasses.is_dataclass(self):
            values |= dataclasses.asdict(self)
        if not own.__module__.startswith('x_transformers.'):
            values |= {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str, bool))}
            try:
                values['source'] = hashlib.sha256(inspect.getsource(own).encode()).hexdigest()[:16]
            except (OSError, TypeError):
                values['source'] = own.__qualname__
        # how a task is trained stands in the settings of a run; a better default makes no other task of it
        return {name: value for name, value in values.items() if name not in ('steps', 'lr')}


@dataclass(frozen=True, kw_only=True)
class SequenceTask(Task):
    """A task whose rows are made by a formula: token ids in, answers at some positions.

    A subclass defines ``rows``. ``evaluate`` measures the loss and the accuracy at the answers of ``test_rows`` rows that no
    seed of training draws.
    """

    metric: ClassVar[str] = 'accuracy'
    better: ClassVar[Direction] = 'higher'

    rows_per_step: int = 64
    test_rows: int = 512
    steps: int = 500
    lr: float = 3e-3

    @abstractmethod
    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        """``count`` rows from ``draws``."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Size of the vocabulary, inputs and answers together."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Length of the longest row, of training and of tests."""

    def batch(self, seed: int, step: int) -> Batch:
        return self.rows(Draws(self.name, 'train', seed, step), self.rows_per_step)

    def test(self) -> Batch:
        """The rows of every evaluation."""
        return self.rows(Draws(self.name, 'test'), self.test_rows, test=True)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        return build_token_model(flags, num_tokens=self.num_tokens, max_seq_len=self.longest)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return measure(model, self.test())

    def resolution(self) -> float:
        return 1.0 / max(1, self.test_rows) if self.metric == 'accuracy' else 0.0

    def metric_range(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.metric in SHARES else (-math.inf, math.inf)


def ignored(rows: int, length: int) -> Tensor:
    """Targets without a single answer (rows length)."""
    return torch.full((rows, length), IGNORE)
