"""Text, images and vectors that need no download: bytes, scikit-learn's digits, one-dimensional shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.evidence.draws import Draws, seed_of
from x_transformers.evidence.model import IGNORE, Batch, build_pooled_model, build_vector_model
from x_transformers.evidence.tasks.base import Direction, SequenceTask, ignored
from x_transformers.training.data import Corpus, load_corpus, sample_batch
from x_transformers.training.errors import DataError


@cache
def corpus_of(data: tuple[str, ...], window: int) -> tuple[Corpus, str]:
    corpus = load_corpus(data, window=window)
    return corpus, str(corpus.fingerprint())


@dataclass(frozen=True, kw_only=True)
class ByteText(SequenceTask):
    """The next byte of text: your files, or the source of Python's standard library; one file in 32 is held out.

    ``bits`` are bits per byte on held-out windows, evenly spread over the text.
    """

    name: ClassVar[str] = 'bytes'
    metric: ClassVar[str] = 'bits'
    better: ClassVar[Direction] = 'lower'
    flags: ClassVar[Mapping[str, Any]] = {
        'dim': 128,
        'depth': 3,
        'heads': 4,
        'attn_dim_head': 32,
        'rotary_pos_emb': True,
        'use_rmsnorm': True,
    }

    data: tuple[str, ...] = ()
    length: int = 128
    rows_per_step: int = 16
    test_rows: int = 128

    @property
    def num_tokens(self) -> int:
        return 256

    @property
    def longest(self) -> int:
        return self.length

    def options(self) -> dict[str, Any]:
        return super().options() | {'fingerprint': corpus_of(tuple(self.data), self.longest + 1)[1]}

    @property
    def read(self) -> int:
        """Bytes of a held-out window."""
        return self.length

    def windows(self, held_out: bool, count: int, seed: int, index: int) -> Batch:
        corpus, _ = corpus_of(tuple(self.data), self.longest + 1)
        text = corpus.held_out if held_out else corpus.train
        if held_out:
            room = len(text) - self.read - 1
            starts = [room * i // max(1, count - 1) for i in range(count)]
            ids = torch.stack([text.window(start, self.read + 1) for start in starts]).long()
        else:
            ids = sample_batch(text, batch=count, window=self.length + 1, seed=seed, index=index)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def batch(self, seed: int, step: int) -> Batch:
        return self.windows(False, self.rows_per_step, seed, step)

    def test(self) -> Batch:
        return self.windows(True, self.test_rows, 0, 0)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        return self.windows(test, count, seed_of('bytes') % 2**31, draws.generator.initial_seed() % 2**31)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        measures = super().evaluate(model)
        return measures | {'bits': measures['loss'] / 0.6931471805599453}


@dataclass(frozen=True, kw_only=True)
class LongerBytes(ByteText):
    """Trained on windows of ``length`` bytes, tested on windows of ``tested``."""

    name: ClassVar[str] = 'bytes/longer'
    tested: int = 512

    def __post_init__(self) -> None:
        if self.tested < self.length:
            raise ValueError(f'tested must be at least length={self.length}, got {self.tested}. Take a larger number.')

    @property
    def longest(self) -> int:
        return self.tested

    @property
    def read(self) -> int:
        return self.tested


@cache
def digit_images() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the task digits needs scikit-learn: pip install 'x-transformers[examples]'") from error
    found: Any = load_digits()
    return torch.as_tensor(found.images).long().flatten(1), torch.as_tensor(found.target).long()


@dataclass(frozen=True, kw_only=True)
class Digits(SequenceTask):
    """Digits of 8 x 8 pixels, pixel by pixel as tokens of 17 grey levels; the digit is asked for at the end.

    The last fifth of the images is held out.
    """

    name: ClassVar[str] = 'digits'
    rows_per_step: int = 32
    test_rows: int = 359

    @property
    def num_tokens(self) -> int:
        return 18

    @property
    def longest(self) -> int:
        return 65

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        images, labels = digit_images()
        training = len(images) - 359
        chosen = torch.arange(training, training + count) if test else draws.whole(0, training - 1, count)
        question = torch.full((count, 1), 17)
        targets = ignored(count, 65)
        targets[:, -1] = labels[chosen]
        return Batch(torch.cat((images[chosen], question), dim=1), targets)


@dataclass(frozen=True, kw_only=True)
class WholeDigits(Digits):
    """The same images for an encoder, whose output for a whole image is the digit; ``average_pool_embed``, ``use_cls_token`` or
    ``attn_pool`` say how it is made of the pixels.
    """

    name: ClassVar[str] = 'digits/pooled'
    flags: ClassVar[Mapping[str, Any]] = {'dim': 64, 'depth': 2, 'heads': 2, 'attn_dim_head': 32}

    @property
    def longest(self) -> int:
        return 64

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        whole = super().rows(draws, count, test=test)
        return Batch(whole.inputs[:, :64], whole.targets[:, 64:])

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        return build_pooled_model(flags, num_tokens=17, classes=10, max_seq_len=64)


@dataclass(frozen=True, kw_only=True)
class Shapes(SequenceTask):
    """One-dimensional shapes of ten classes, stretched, moved, sheared and noisy, as vectors of one number each.

    A class is a fixed smooth curve of twelve points. As with MNIST-1D, a row is forty points in which the curve lies anywhere.
    """

    name: ClassVar[str] = 'shapes'
    noise: float = 0.25
    length: int = 40
    rows_per_step: int = 64

    @property
    def num_tokens(self) -> int:
        return 10

    @property
    def longest(self) -> int:
        return self.length

    def templates(self) -> Tensor:
        """(10, 12)"""
        steps = torch.linspace(0, 1, 12)
        draws = Draws('shapes')
        waves = torch.stack([torch.sin(torch.pi * k * steps) for k in range(1, 5)])
        curves = draws.normal(10, 4) @ waves
        return curves / curves.abs().amax(dim=-1, keepdim=True)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        labels = draws.whole(0, 9, count)
        curve = self.templates()[labels]
        wide = 12 + draws.uniform(count) * (self.length / 2 - 12)
        start = draws.uniform(count) * (self.length - wide)
        # each point of a row is read off its curve, between two of the twelve points; outside lies 0
        at = (torch.arange(self.length) - start[:, None]) / wide[:, None] * 11
        low = at.floor().clamp(0, 10).long()
        share = at - low
        values = curve.gather(1, low) * (1 - share) + curve.gather(1, low + 1) * share
        values = values.where((at >= 0) & (at <= 11), 0.0) * (0.6 + 0.8 * draws.uniform(count, 1))
        slope = 0.75 * (draws.uniform(count, 1) - 0.5) * torch.linspace(-1, 1, self.length)
        values = values + slope + self.noise * draws.normal(count, self.length)
        targets = torch.full((count, self.length), IGNORE)
        targets[:, -1] = labels
        return Batch(values[..., None], targets)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        return build_vector_model(flags, dim_in=1, dim_out=10, max_seq_len=self.length)
