"""The data of a run: bytes of files, or token shards, with one interface."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from x_transformers.training.batches import TokenBatches, held_out_rows
from x_transformers.training.data import (
    HOLD_OUT_ONE_IN,
    ByteBatches,
    Corpus,
    Source,
    bits_per_byte,
    find_sources,
    load_corpus,
    standard_library,
)
from x_transformers.training.documents import has_records, read_documents
from x_transformers.training.errors import DataError, TrainingError
from x_transformers.training.options import TrainOptions
from x_transformers.training.shards import Prepared, TokenText, cache_folder, content_digests, is_held_out, prepare_shards
from x_transformers.training.tokens import Bytes, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe

IN_MEMORY = 1 << 30  # plain bytes up to here are sampled from where they are

LossOf = Callable[[Any], Tensor]  # of a batch, the mean over what it predicts, in nats
Say = Callable[[str], None]


class Data(Protocol):
    """A corpus: what is trained on, and what is held out of it."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def about(self) -> str: ...
    @property
    def bytes_per_token(self) -> float: ...

    def fingerprint(self) -> str:
        """Changes when what is learned changes."""
        ...

    def batches(self, options: TrainOptions, rank: int = 0, world_size: int = 1) -> Any: ...
    def first(self, length: int) -> Any:
        """A batch of one row, to try a model on."""
        ...

    def evaluate(self, loss: LossOf, options: TrainOptions, limit: int | None) -> dict[str, float]:
        """Figures on about ``limit`` bytes, spread over the held-out text; None: on all of it."""
        ...

    def final(self, loss: LossOf, options: TrainOptions) -> tuple[bytes, float]:
        """(the beginning of the held-out text, bits per byte on it)."""
        ...


@dataclass(frozen=True)
class ByteData:
    """Bytes at random places of a text."""

    corpus: Corpus
    tokenizer: Tokenizer

    bytes_per_token: float = 1.0

    @property
    def about(self) -> str:
        return self.corpus.about

    def fingerprint(self) -> str:
        return self.corpus.fingerprint()

    def batches(self, options: TrainOptions, rank: int = 0, world_size: int = 1) -> ByteBatches:
        return ByteBatches(
            self.corpus.train, batch=options.batch, window=options.seq_len, seed=options.seed, rank=rank, world_size=world_size
        )

    def first(self, length: int) -> Tensor:
        return self.corpus.train.window(0, length).long()[None]

    def evaluate(self, loss: LossOf, options: TrainOptions, limit: int | None) -> dict[str, float]:
        text = self.corpus.held_out
        bits = bits_per_byte(loss, text, batch=options.batch, window=options.seq_len, limit=limit)
        return {'held_out_bits_per_byte': bits, 'held_out_loss': bits * math.log(2)}

    def final(self, loss: LossOf, options: TrainOptions) -> tuple[bytes, float]:
        text, _ = self.corpus.held_out.split(options.final_bytes)
        bits = bits_per_byte(loss, text, batch=options.batch, window=options.seq_len)
        return b''.join(text.chunks()), bits


@dataclass(frozen=True)
class TokenData:
    """Token shards, one corpus or a mixture of several."""

    parts: tuple[tuple[Prepared, float], ...]
    tokenizer: Tokenizer
    about: str

    @property
    def bytes_per_token(self) -> float:
        return self.parts[0][0].train.bytes_per_token

    def fingerprint(self) -> str:
        parts = [f'{prepared.digest}:{weight:g}' for prepared, weight in self.parts]
        return parts[0].partition(':')[0] if len(parts) == 1 else hashlib.blake2b(','.join(parts).encode()).hexdigest()[:32]

    def batches(self, options: TrainOptions, rank: int = 0, world_size: int = 1) -> TokenBatches:
        return TokenBatches(
            [(prepared.train, weight) for prepared, weight in self.parts], batch=options.batch, window=options.seq_len,
            seed=options.seed, apart=options.mask_documents, rank=rank, world_size=world_size,
        )  # fmt: skip

    def first(self, length: int) -> Tensor:
        return self.parts[0][0].train.window(0, length)[None]

    def evaluate(self, loss: LossOf, options: TrainOptions, limit: int | None) -> dict[str, float]:
        found: dict[str, float] = {}
        total = weights = 0.0
        for number, (prepared, weight) in enumerate(self.parts):
            nats, bits = loss_and_bits(loss, prepared.held_out, options, limit)
            total, weights = total + weight * nats, weights + weight
            if len(self.parts) > 1:
                found[f'held_out_{number}_loss'] = nats
                found[f'held_out_{number}_bits_per_byte'] = bits
            else:
                found['held_out_bits_per_byte'] = bits
        return {'held_out_loss': total / weights} | found

    def final(self, loss: LossOf, options: TrainOptions) -> tuple[bytes, float]:
        text = self.parts[0][0].held_out
        text, _ = text.split(min(len(text), max(2, round(options.final_bytes / max(text.bytes_per_token, 1e-9)))))
        _, bits = loss_and_bits(loss, text, options, None)
        return self.tokenizer.decode(text.window(0, len(text)).tolist()), bits


def loss_and_bits(loss: LossOf, text: TokenText, options: TrainOptions, limit: int | None) -> tuple[float, float]:
    """(nats per predicted token, bits per byte). Bytes are counted by what a token of this text stands for on average."""
    tokens = None if limit is None else max(1, round(limit / max(text.bytes_per_token, 1e-9)))
    total, count = 0.0, 0
    rows = held_out_rows(text, batch=options.batch, window=options.seq_len, apart=options.mask_documents, limit=tokens)
    for batch, predicted in rows:
        if predicted:
            total += float(loss(batch)) * predicted
            count += predicted
    nats = total / max(count, 1)
    return nats, nats / math.log(2) / max(text.bytes_per_token, 1e-9)


def loss_and_bits_of_all(loss: LossOf, made: Prepared, options: TrainOptions, limit: int | None) -> tuple[float, float]:
    """The same over both sides of a corpus that is for evaluation only."""
    sides = [side for side in (made.train, made.held_out) if len(side) > 1]
    found = [loss_and_bits(loss, side, options, limit) for side in sides]
    weights = [len(side) for side in sides]
    nats, bits = (sum(w * f[i] for w, f in zip(weights, found, strict=True)) / max(sum(weights), 1) for i in range(2))
    return nats, bits


# ---------------------------------------------------------------- from options


def load_data(options: TrainOptions, say: Say, run: Path | None = None) -> Data:
    """Read, or tokenize, what the options name.

    Args:
        run: a run folder whose tokenizer is used instead of the one that the options name.

    Errors: ``DataError`` for data that are missing, damaged or too little.
    """
    groups = mixture(options.data)
    bytewise = options.tokenizer == 'bytes' if run is None else isinstance(load_tokenizer(run), Bytes)
    plain = bytewise and len(groups) == 1 and not options.document_separator and not options.mask_documents
    if plain:
        found = find_sources(groups[0][0]) if groups[0][0] else standard_library()
        small = sum(source.path.stat().st_size for source in found) <= IN_MEMORY
        if small and not any(has_records(source.path) or source.path.suffix == '.zst' for source in found):
            return ByteData(load_corpus(groups[0][0], window=options.seq_len), Bytes())
    separator = separator_of(options.document_separator)
    sources = [(find_sources(patterns) if patterns else standard_library(), weight) for patterns, weight in groups]
    cache = Path(options.data_cache).expanduser() if options.data_cache else cache_folder()
    tokenizer = choose_tokenizer(options, [s for found, _ in sources for s in found], separator, cache, say, run)
    parts = []
    for (found, weight), (patterns, _) in zip(sources, groups, strict=True):
        about = ', '.join(patterns) if patterns else "the source of Python's standard library"
        made = prepare_shards(found, tokenizer, separator=separator, say=say, cache=cache, about=about)
        parts.append((with_held_out(made, options.seq_len), weight))
    lines = [
        f'{made.about}: {len(made.train):,} tokens to train on, {len(made.held_out):,} held out '
        f'({made.train.documents + made.held_out.documents:,} documents, {made.train.bytes_per_token:.2f} bytes per token)'
        for made, _ in parts
    ]
    return TokenData(tuple(parts), tokenizer, '\n'.join(lines))


def separator_of(typed: str | None) -> bytes | None:
    """What stands between documents; a shell makes it hard to type a line break or a tab."""
    return typed.encode().replace(b'\\n', b'\n').replace(b'\\t', b'\t') if typed else None


def load_sets(options: TrainOptions, tokenizer: Tokenizer, say: Say) -> dict[str, Prepared]:
    """``--val-data``: sets by their names, which are the last parts of their paths."""
    cache = Path(options.data_cache).expanduser() if options.data_cache else cache_folder()
    return {
        Path(pattern).stem: prepare_shards(find_sources([pattern]), tokenizer, say=say, cache=cache, about=pattern)
        for pattern in options.val_data
    }


def mixture(data: Sequence[str]) -> list[tuple[tuple[str, ...], float]]:
    """``('a/:0.7,b/:0.3',)`` as two corpora with weights; anything else is one corpus."""
    pieces = [piece for entry in data for piece in entry.split(',')]
    matches = [re.fullmatch(r'(.+):(\d*\.?\d+)', piece) for piece in pieces]
    if not any(',' in entry for entry in data) or not any(matches):
        return [(tuple(entry.removeprefix('hf:') for entry in data), 1.0)]
    wrong = [piece for piece, match in zip(pieces, matches, strict=True) if match is None or float(match[2]) <= 0]
    if wrong:
        raise DataError(f'--data must give each part of a mixture a weight above 0, as in a/:0.7,b/:0.3, got {wrong[0]!r}.')
    return [((match[1].removeprefix('hf:'),), float(match[2])) for match in matches if match is not None]


def choose_tokenizer(
    options: TrainOptions, sources: Sequence[Source], separator: bytes | None, cache: Path, say: Say, run: Path | None
) -> Tokenizer:
    if run is not None:
        return load_tokenizer(run)
    if options.tokenizer == 'bytes':
        return Bytes()
    if options.tokenizer != 'bpe':
        return load_tokenizer(Path(options.tokenizer).expanduser())
    cache.mkdir(parents=True, exist_ok=True)
    facts = f'{options.vocab}/{separator!r}/' + '/'.join(content_digests(sources, cache))
    path = cache / 'tokenizers' / f'{hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()}.json'
    if path.exists():
        return JsonTokenizer(path.read_bytes(), str(path))
    say(f'training a tokenizer of {options.vocab:,} tokens')

    def texts() -> Iterator[bytes]:
        return (document.text for source in sources for document in read_documents(source, separator))

    kept = (text for text in texts() if not is_held_out(text))
    first = next(kept, None)
    # all of very few documents may be held out: then their end is, see ``with_held_out``
    made = train_bpe(texts() if first is None else chain([first], kept), options.vocab)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path.parent)
    (path.parent / 'tokenizer.json').replace(path)
    return made


def with_held_out(made: Prepared, window: int) -> Prepared:
    """Where too little was held out, the end of the text is; where too little was left, all but the end of what was.

    Errors: ``DataError`` if there is not enough text for one row on each side.
    """
    train, held_out = made.train, made.held_out
    total = len(train) + len(held_out)
    if total == 0:
        raise DataError(f'{made.about} must hold text, got none.')
    end = max(total // HOLD_OUT_ONE_IN, window)
    if len(train) < window:
        # documents are held out by what they say: of very few it may be all
        train, held_out = held_out.split(max(len(held_out) - end, 0))
    elif len(held_out) < max(window, total // 100):
        train, held_out = train.split(max(len(train) - end, 0))
    if len(train) < window:
        raise DataError(
            f'{made.about} must hold a row of {window:,} tokens to train on and one to hold out, got {total:,} tokens: '
            'give more text or a smaller --seq-len.'
        )
    return Prepared(train, held_out, made.digest, made.about)


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    if tokenizer.size != size:
        raise TrainingError(
            f'--tokenizer must have the {size:,} tokens that the run was started with, got {tokenizer.size:,}.'
        )  # fmt: skip
