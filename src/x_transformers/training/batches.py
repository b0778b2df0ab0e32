"""The tokens of each step: windows of token texts, in an order that depends only on the seed.

Every epoch passes through all windows of a text once, in an order of its own. A window is found from its number without holding
the order: so a run that goes on, or goes on with another number of processes, neither repeats nor leaves out a window.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.tensor_types import Bool, Int
from x_transformers.training.shards import TokenText

IGNORED = -100


def permuted(number: int, count: int, seed: int) -> int:
    """The place of ``number`` in an order of 0 … count - 1 that the seed gives; no two numbers have the same.

    Four rounds of a Feistel network over the next even power of two, repeated until the result is below ``count``.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for key in range(4):
            data = f'{seed}/{key}/{right}'.encode()
            mixed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
            left, right = right, left ^ (mixed & mask)
        number = left << half | right
        if number < count:
            return number


class Windows:
    """The windows of one text: each shares one token with the next, so that every token but the first is predicted once."""

    def __init__(self, text: TokenText, window: int, seed: int) -> None:
        self.text, self.window, self.seed = text, window, seed
        self.count = max(1, (len(text) - 1) // (window - 1))

    def start(self, number: int) -> int:
        """Where the window begins that stands at place ``number`` of all epochs, one after the other."""
        epoch, place = divmod(number, self.count)
        return permuted(place, self.count, self.seed + epoch) * (self.window - 1)


class Example(NamedTuple):
    """One row: its ids, what each of them is to predict, and the number of the document of each."""

    ids: Int[Tensor, ' n']
    targets: Int[Tensor, ' n']
    documents: Int[Tensor, ' n']


def example(text: TokenText, start: int, length: int, *, with_prompts: bool, apart: bool) -> Example:
    """A window of a text.

    A prompt is not predicted, and with ``apart`` neither is the first token of a document from the one before it.
    """
    ids = text.window(start, length)
    targets = torch.cat((ids[1:], ids.new_full((1,), IGNORED)))
    documents = torch.zeros_like(ids)
    if with_prompts or apart:
        for number, (first, last, prompt) in enumerate(text.spans(start, len(ids))):
            inside = slice(max(first, 0), max(last, 0))
            documents[inside] = number
            if with_prompts and prompt > first:
                targets[max(first - 1, 0) : max(prompt - 1, 0)] = IGNORED
            if apart and first > 0:
                targets[first - 1] = IGNORED
    return Example(ids, targets, documents)


class TokenBatches:
    """Rows of token ids for a language model, from one text or a mixture of several.

    Args:
        texts: (text, weight): of a large number of rows, each text has its share.
        batch: rows of one micro-batch, of all processes together.
        window: tokens of a row.
        apart: documents in one row do not see each other.
        rank, world_size: of ``world_size`` processes, the one with this number takes every ``world_size``-th row.
    """

    def __init__(
        self,
        texts: Sequence[tuple[TokenText, float]],
        *,
        batch: int,
        window: int,
        seed: int,
        apart: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows = [Windows(text, window, seed + 1_000_003 * number) for number, (text, _) in enumerate(texts)]
        self.mixture = Mixture([weight for _, weight in texts], seed)
        self.rows, self.window, self.apart = batch, window, apart
        self.rank, self.world_size = rank, world_size
        self.with_prompts = any(text.has_prompts for text, _ in texts)

    def batch(self, index: int) -> Any:
        """Ids (b n); where some are not to be predicted or seen, the keywords of ``AutoregressiveWrapper`` that say so."""
        numbers = range(index * self.rows + self.rank, (index + 1) * self.rows, self.world_size)
        return rows_of(
            [self.example(number) for number in numbers], with_prompts=self.with_prompts, apart=self.apart
        )  # fmt: skip

    def example(self, number: int) -> Example:
        """Row ``number`` of the run."""
        which, place = self.mixture.place(number)
        windows = self.windows[which]
        start = windows.start(place)
        return example(windows.text, start, self.window, with_prompts=self.with_prompts, apart=self.apart)

    @staticmethod
    def predictions(batch: Any) -> int:
        """How many targets count."""
        if isinstance(batch, Tensor):
            return batch.shape[0] * (batch.shape[1] - 1)
        return int((batch['targets'] != IGNORED).sum())


def rows_of(examples: Sequence[Example], *, with_prompts: bool, apart: bool) -> Any:
    ids = torch.stack([row.ids for row in examples])
    if not with_prompts and not apart:
        return ids
    given: dict[str, Any] = {'x': ids, 'targets': torch.stack([row.targets for row in examples])}
    if apart:
        given['attn_mask'] = same_document(torch.stack([row.documents for row in examples]))
    return given


def same_document(documents: Int[Tensor, 'b n']) -> Bool[Tensor, 'b 1 n n']:
    return (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)


class Mixture:
    """Which text each row comes from: in every thousand rows each text has its share, in an order that the seed gives."""

    BLOCK = 1000

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        exact = [self.BLOCK * weight / total for weight in weights]
        self.counts = [int(share) for share in exact]
        most_left = sorted(range(len(exact)), key=lambda i: (self.counts[i] - exact[i], i))
        for i in most_left[: self.BLOCK - sum(self.counts)]:
            self.counts[i] += 1
        self.seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def place(self, number: int) -> tuple[int, int]:
        """(which text, how many rows of that text came before) of row ``number``."""
        if len(self.counts) == 1:
            return 0, number
        block, inside = divmod(number, self.BLOCK)
        which, before = self._block(block)[inside]
        return which, block * self.counts[which] + before

    def _make_block(self, block: int) -> list[tuple[int, int]]:
        order = [which for which, count in enumerate(self.counts) for _ in range(count)]
        random.Random(f'{self.seed}/{block}').shuffle(order)
        seen = [0] * len(self.counts)
        made = []
        for which in order:
            made.append((which, seen[which]))
            seen[which] += 1
        return made


def held_out_rows(
    text: TokenText, *, batch: int, window: int, apart: bool, limit: int | None = None
) -> Iterator[tuple[Any, int]]:
    """(batch, how many targets count) over a whole text; ``limit`` asks for about so many tokens, evenly spread."""
    starts = list(range(0, max(len(text) - 1, 0), window - 1))
    if limit is not None:
        count = max(1, limit // (window - 1))
        starts = starts[:: max(1, -(-len(starts) // count))]
    with_prompts = text.has_prompts
    group: list[Example] = []
    for start in starts:
        row = example(text, start, window, with_prompts=with_prompts, apart=apart)
        if group and (len(group) == batch or len(row.ids) != len(group[0].ids)):
            yield _counted(group, with_prompts, apart)
            group = []
        if len(row.ids) > 1:
            group.append(row)
    if group:
        yield _counted(group, with_prompts, apart)


def _counted(group: Sequence[Example], with_prompts: bool, apart: bool) -> tuple[Any, int]:
    made = rows_of(group, with_prompts=with_prompts, apart=apart)
    return made, TokenBatches.predictions(made)


class Prefetched:
    """Makes the next batches in a thread, in pinned memory for an accelerator that copies from there."""

    def __init__(self, batches: Any, *, last: int, ahead: int = 2, pinned: bool = False) -> None:
        self.batches, self.last, self.ahead, self.pinned = batches, last, ahead, pinned
        self.predictions: Callable[[Any], int] = batches.predictions
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='batches')
        self._made: dict[int, Future[Any]] = {}

    def batch(self, index: int) -> Any:
        wanted = range(index, min(index + self.ahead + 1, self.last))
        self._made = {number: made for number, made in self._made.items() if number in wanted}
        for number in wanted:
            if number not in self._made:
                self._made[number] = self._pool.submit(self._make, number)
        found = self._made.pop(index, None)
        return self._make(index) if found is None else found.result()

    def _make(self, index: int) -> Any:
        made = self.batches.batch(index)
        if not self.pinned:
            return made
        if isinstance(made, Tensor):
            return made.pin_memory()
        return {name: value.pin_memory() for name, value in made.items()}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
