"""The loss of a language model on separate documents, and the confidence interval of its mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.losses import token_cross_entropy
from x_transformers.training.build import network_of, reading_arguments
from x_transformers.training.documents import Document
from x_transformers.training.errors import DataError
from x_transformers.training.tokens import Tokenizer

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Figure:
    """A mean, and between which bounds it lies with 95 % confidence; without bounds if there was one document."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        bounds = '' if self.low is None or self.high is None else f'  ({self.low:.4f} to {self.high:.4f})'
        return f'{self.value:.4f}{bounds}'


@dataclass(frozen=True)
class Evaluation:
    documents: int
    tokens: int
    bytes: int
    loss: Figure  # nats per token
    perplexity: Figure
    bits_per_byte: Figure

    def __str__(self) -> str:
        lines = [
            f'{self.documents:,} documents, {self.tokens:,} predicted tokens, {self.bytes:,} bytes',
            f'  loss           {self.loss} nats per token',
            f'  perplexity     {self.perplexity}',
            f'  bits per byte  {self.bits_per_byte}',
        ]
        if self.documents > 1:
            lines.append('in brackets: 95 % intervals, over documents')
        return '\n'.join(lines)


def ratio(amounts: Sequence[float], sizes: Sequence[float]) -> Figure:
    """The sum of the amounts over that of the sizes; documents are the independent draws (delta method)."""
    total, count = sum(sizes), len(sizes)
    value = sum(amounts) / total
    if count < 2:
        return Figure(value)
    spread = sum((amount - value * size) ** 2 for amount, size in zip(amounts, sizes, strict=True))
    error = NORMAL_95 * math.sqrt(spread * count / (count - 1)) / total
    return Figure(value, value - error, value + error)


def evaluate(
    model: nn.Module, tokenizer: Tokenizer, documents: Iterable[Document], *, window: int, batch: int, device: torch.device
) -> Evaluation:
    """Loss, perplexity and bits per byte.

    A document is read in windows, each sharing one token with the next. Where the tokenizer has a token between documents it
    stands in front, so that the first token is predicted, too; else the first token is only read. A prompt is only read.

    Errors: ``DataError`` if there is nothing to predict.
    """
    nats: list[float] = []
    tokens: list[float] = []
    sizes: list[float] = []
    rows: list[tuple[int, list[int], int]] = []  # document, ids, how many at the beginning are only read

    def flush() -> None:
        for (number, ids, read), total in zip(rows, losses(model, rows, device), strict=True):
            nats[number] += total
            tokens[number] += len(ids) - read
        rows.clear()

    mode = model.training
    model.eval()
    try:
        for number, document in enumerate(documents):
            texts = [document.text[: document.prompt], document.text[document.prompt :]] if document.prompt else [document.text]
            encoded = tokenizer.encode(texts)
            ids = [token for part in encoded for token in part]
            front = [] if tokenizer.end is None else [tokenizer.end]
            read = len(encoded[0]) if document.prompt else 0
            first = max(1, len(front) + read)  # the first that is predicted
            ids = [*front, *ids]
            nats.append(0.0)
            tokens.append(0.0)
            unseen = 1 if not front and not document.prompt else 0
            sizes.append(float(len(document.text) - document.prompt - unseen))
            for start in range(0, max(len(ids) - 1, 0), window - 1):
                row = ids[start : start + window]
                if start + len(row) > first and len(row) > 1:
                    rows.append((number, row, max(1, first - start)))
                if len(rows) == batch:
                    flush()
        flush()
    finally:
        model.train(mode)
    kept = [i for i, count in enumerate(tokens) if count]
    if not kept:
        raise DataError('--data must hold tokens to predict, got none.')
    nats, tokens, sizes = ([values[i] for i in kept] for values in (nats, tokens, sizes))
    loss, bits = ratio(nats, tokens), ratio([n / math.log(2) for n in nats], sizes)
    perplexity = Figure(*(None if v is None else math.exp(min(v, 700)) for v in (loss.value, loss.low, loss.high)))  # type: ignore[arg-type]
    return Evaluation(len(kept), int(sum(tokens)), int(sum(sizes)), loss, perplexity, bits)


@torch.no_grad()
def losses(model: nn.Module, rows: Sequence[tuple[int, list[int], int]], device: torch.device) -> Iterator[float]:
    """The sum over what is predicted of each row, in nats. Rows are padded behind, where a causal model does not look."""
    if not rows:
        return
    longest = max(len(ids) for _, ids, _ in rows)
    x = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for i, (_, ids, read) in enumerate(rows):
        x[i, : len(ids)] = torch.tensor(ids)
        targets[i, read - 1 : len(ids) - 1] = x[i, read : len(ids)]
    net: Any = network_of(model)
    logits: Tensor = net(x.to(device), **reading_arguments(model))
    is_log_prob = bool(getattr(net, 'output_is_log_prob', False))
    loss = token_cross_entropy(logits.float(), targets.to(device), is_log_prob=is_log_prob, reduction='none')
    yield from loss.double().sum(dim=-1).tolist()
