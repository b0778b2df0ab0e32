"""The six tasks of mechanistic architecture design (https://arxiv.org/abs/2403.17844)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.model import IGNORE, Batch, build_language_model, on_device_of
from x_transformers.evidence.tasks.base import SequenceTask, ignored
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int

# four residual layers: mixer, SwiGLU, mixer, SwiGLU, with a norm before each and before the head
BLOCKS: Mapping[str, Any] = {
    'dim': 128,
    'depth': 2,
    'heads': 8,
    'attn_dim_head': 16,
    'rotary_pos_emb': True,
    'use_rmsnorm': True,
    'ff_glu': True,
    'ff_swish': True,
}


@dataclass(frozen=True, kw_only=True)
class MadTask(SequenceTask):
    """What the six share. ``samples`` training rows are drawn once and met again every epoch; 0: each row is new."""

    flags: ClassVar[Mapping[str, Any]] = BLOCKS
    metric: ClassVar[str] = 'balanced_accuracy'

    vocabulary: int = 16
    length: int = 128
    samples: int = 0
    rows_per_step: int = 128
    test_rows: int = 1280
    steps: int = 1500
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.vocabulary < 4 or self.vocabulary % 2:
            raise ValueError(f'vocabulary must be even and at least 4, got {self.vocabulary}. Take 16.')

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def longest(self) -> int:
        return self.length

    def batch(self, seed: int, step: int) -> Batch:
        if not self.samples:
            return super().batch(seed, step)
        # rows come in blocks of one batch, each made from its own key; epochs visit the blocks in a new order
        blocks = max(1, self.samples // self.rows_per_step)
        epoch, place = divmod(step, blocks)
        block = int(Draws(self.name, 'order', seed, epoch).orders(1, blocks)[0, place])
        return self.rows(Draws(self.name, 'train', seed, block), min(self.rows_per_step, self.samples))


@dataclass(frozen=True, kw_only=True)
class InContextRecall(MadTask):
    """Pairs of a key and a value; a key keeps its value within a row. The last pair repeats a key that was there before.

    In training each next token is asked for; in tests the values of keys that were there before.
    """

    name: ClassVar[str] = 'mad/in-context'

    def pairs(self, draws: Draws, count: int) -> tuple[Tensor, Tensor]:
        """(keys, values), each (count, length / 2)."""
        half, number = self.vocabulary // 2, self.length // 2
        table = draws.whole(half, self.vocabulary - 1, count, half)
        keys = draws.whole(0, half - 1, count, number)
        earlier = (draws.uniform(count) * (number - 1)).long()
        keys[:, -1] = keys.gather(1, earlier[:, None])[:, 0]
        return keys, table.gather(1, keys)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        keys, values = self.pairs(draws, count)
        inputs = torch.stack((keys, values), dim=-1).flatten(1)
        targets = ignored(count, inputs.shape[1])
        if not test:
            targets[:, :-1] = inputs[:, 1:]
            return Batch(inputs, targets)
        targets[:, 0::2] = values.where(seen_before(keys), IGNORE)
        return Batch(inputs, targets)


def seen_before(keys: Int[Tensor, 'b p']) -> Tensor:
    """Whether the same key stands earlier in its row (b p)."""
    same = keys[:, :, None] == keys[:, None, :]
    return same.tril(diagonal=-1).any(dim=-1)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall in which a pair is two noise tokens with probability ``noise``."""

    name: ClassVar[str] = 'mad/noisy'
    noise: float = 0.2
    noise_tokens: int = 16

    @property
    def num_tokens(self) -> int:
        return self.vocabulary + self.noise_tokens

    def pairs(self, draws: Draws, count: int) -> tuple[Tensor, Tensor]:
        half, number = self.vocabulary // 2, self.length // 2
        table = draws.whole(half, self.vocabulary - 1, count, half)
        keys = draws.whole(0, half - 1, count, number)
        noisy = draws.uniform(count, number) < self.noise
        noisy[:, 0] = False
        noisy[:, -1] = False
        # the last key is one of the real ones before it
        score = draws.uniform(count, number - 1).masked_fill(noisy[:, :-1], -1.0)
        keys[:, -1] = keys.gather(1, score.argmax(dim=-1, keepdim=True))[:, 0]
        values = table.gather(1, keys)
        first, second = draws.whole(self.vocabulary, self.num_tokens - 1, 2, count, number)
        return first.where(noisy, keys), second.where(noisy, values)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        batch = super().rows(draws, count, test=test)
        if not test:
            return batch
        # noise is not a value
        return Batch(batch.inputs, batch.targets.masked_fill(batch.targets >= self.vocabulary, IGNORE))


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(MadTask):
    """Recall whose keys and values are motifs of one to three different tokens; in tests keys have three.

    A row has as many keys as there are key tokens; each begins with a token of its own. All tokens of the value of a key that
    was there before are asked for.
    """

    name: ClassVar[str] = 'mad/fuzzy'
    motif: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.motif <= self.vocabulary // 2:
            raise ValueError(f'motif must be from 1 to {self.vocabulary // 2}, got {self.motif}. Take 3.')

    def motifs(self, draws: Draws, count: int) -> Tensor:
        """One motif per key token, without repetition inside (count half motif), counted from 0."""
        half = self.vocabulary // 2
        first = torch.arange(half).expand(count, half)
        rest = draws.uniform(count, half, half).masked_fill(torch.eye(half, dtype=torch.bool), -1.0)
        return torch.cat((first[..., None], rest.topk(self.motif, dim=-1).indices[..., : self.motif - 1]), dim=-1)

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        half, number, wide = self.vocabulary // 2, self.length // 2, self.motif
        keys, values = self.motifs(draws, count), half + draws.uniform(count, half, half).topk(wide, dim=-1).indices
        key_sizes = draws.whole(wide if test else 1, wide, count, half)
        value_sizes = draws.whole(1, wide, count, half)
        order = draws.whole(0, half - 1, count, number)

        # where each pair begins; what stands behind the end goes to a place that is cut off
        size = (key_sizes + value_sizes).gather(1, order)
        start = size.cumsum(dim=-1) - size
        inputs, targets = (torch.full((count, self.length + 1), fill) for fill in (0, IGNORE))
        repeated = seen_before(order)
        for table, sizes, ahead, asked in (
            (keys, key_sizes, torch.zeros_like(start), torch.zeros_like(repeated)),
            (values, value_sizes, key_sizes.gather(1, order), repeated),
        ):
            sizes_here = sizes.gather(1, order)
            for offset in range(wide):
                token = table[..., offset].gather(1, order)
                place = (start + ahead + offset).where(offset < sizes_here, self.length).clamp_max(self.length)
                inputs.scatter_(1, place, token)
                before = (place - 1).where(asked & (place < self.length), self.length)
                targets.scatter_(1, before, token)
        inputs, targets = inputs[:, : self.length], targets[:, : self.length].clone()
        if not test:
            targets[:, :-1] = inputs[:, 1:]
            targets[:, -1] = IGNORE
        return Batch(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(MadTask):
    """``copied`` data tokens between blanks, then "copy"; at the last positions the data are asked for, in order."""

    name: ClassVar[str] = 'mad/selective-copying'
    length: int = 256
    copied: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copied < 1 or self.length < 2 * self.copied + 1:
            raise ValueError(
                f'length must be at least 2 copied + 1, got length={self.length}, copied={self.copied}. Copy fewer tokens.'
            )

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        blank, copy, room = self.vocabulary - 2, self.vocabulary - 1, self.length - self.copied - 1
        data = draws.whole(0, self.vocabulary - 3, count, self.copied)
        places = draws.subsets(count, room, self.copied).sort(dim=-1).values
        inputs = torch.full((count, self.length), blank)
        inputs.scatter_(1, places, data)
        inputs[:, room] = copy
        targets = ignored(count, self.length)
        targets[:, -self.copied :] = data
        return Batch(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Compression(MadTask):
    """Random tokens and one "compress" token, from whose final state all of them are decoded."""

    name: ClassVar[str] = 'mad/compression'
    length: int = 32

    @property
    def num_tokens(self) -> int:
        return self.vocabulary + 1

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        inputs = draws.whole(0, self.vocabulary - 1, count, self.length)
        inputs[:, -1] = self.vocabulary
        return Batch(inputs, inputs.clone())

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        net = build_language_model(flags, num_tokens=self.num_tokens, max_seq_len=self.length)
        return CompressionModel(net, int(flags['dim']), self.num_tokens)


class CompressionModel(Module):
    """The last state, with a sinusoid for each position, through two layers to the token that stood there."""

    def __init__(self, net: nn.Module, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.net = net
        self.decode = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, num_tokens))

    def forward(self, batch: Batch) -> Float[Tensor, '']:
        return F.cross_entropy(*self.answers(batch))

    def answers(self, batch: Batch) -> tuple[Float[Tensor, 'a v'], Int[Tensor, ' a']]:
        batch = on_device_of(self, batch)
        asked = batch.targets != IGNORE
        state = self.net(batch.inputs, return_embeddings=True)[:, -1:]
        logits = self.decode(state + sinusoids(batch.inputs.shape[1], state.shape[-1]).to(state))
        return logits[asked], batch.targets[asked]


def sinusoids(length: int, dim: int) -> Float[Tensor, 'n d']:
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]


@dataclass(frozen=True, kw_only=True)
class Memorization(MadTask):
    """A fixed map from keys to values, to be kept in the weights: rows of "key ?", the value is asked for at "?"."""

    name: ClassVar[str] = 'mad/memorization'
    vocabulary: int = 256
    length: int = 32
    samples: int = 256

    @property
    def num_tokens(self) -> int:
        return self.vocabulary + 1

    def rows(self, draws: Draws, count: int, *, test: bool = False) -> Batch:
        half = self.vocabulary // 2
        table = half + Draws(self.name, 'map').whole(0, half - 1, half)
        keys = draws.whole(0, half - 1, count, self.length // 2)
        inputs = torch.full((count, self.length), self.vocabulary)
        inputs[:, 0 : 2 * keys.shape[1] : 2] = keys
        targets = ignored(count, self.length)
        targets[:, 1::2] = table[keys]
        return Batch(inputs, targets)
