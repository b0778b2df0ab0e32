"""Conversion from text to token ids and back: bytes, or a tokenizer's file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from x_transformers.training.errors import DataError, TrainingError
from x_transformers.training.files import write_atomically
from x_transformers.training.pieces import Pieces, added_tokens, cuts_like_gpt2

END = '<|endoftext|>'
TRAIN_ON_BYTES = 100_000_000  # as much text as a new tokenizer looks at
EXTRA = "it needs its extra: pip install '.[data]' in a clone"


class Tokenizer(Protocol):
    """Turns texts into ids. ``end`` closes a document, None: nothing does."""

    size: int
    end: int | None

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]: ...
    def decode(self, ids: Sequence[int]) -> bytes: ...
    def digest(self) -> str:
        """Two tokenizers with one digest give the same ids."""
        ...

    def save(self, folder: Path) -> None:
        """Write what ``load_tokenizer(folder)`` needs."""
        ...


class Bytes:
    """Each byte is a token."""

    size = 256

    def __init__(self) -> None:
        self.end: int | None = None

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        return list(texts)

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def digest(self) -> str:
        return 'bytes'

    def save(self, folder: Path) -> None:
        pass


class JsonTokenizer:
    """A ``tokenizer.json`` of Hugging Face's ``tokenizers``."""

    def __init__(self, data: bytes, name: str = 'tokenizer.json') -> None:
        try:
            from tokenizers import Tokenizer as Made
        except ImportError as error:
            raise TrainingError(f'--tokenizer {name} reads a tokenizer.json: {EXTRA}') from error
        try:
            self.made: Any = Made.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f'--tokenizer {name} must be a tokenizer.json, got something else ({error}).') from error
        self.data = data
        self.size = int(self.made.get_vocab_size())
        self.pieces = Pieces(self._encode, added_tokens(data)) if cuts_like_gpt2(data) else self._encode
        ends = ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>', '[SEP]')
        self.end: int | None = next((found for found in map(self.made.token_to_id, ends) if found is not None), None)

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        return self.pieces([text.decode('utf-8', 'replace') for text in texts])

    def _encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self.made.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> bytes:
        text: str = self.made.decode(list(ids), skip_special_tokens=False)
        return text.encode()

    def digest(self) -> str:
        return hashlib.blake2b(self.data, digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        write_atomically(folder / 'tokenizer.json', self.data)


class SentencePiece:
    """A ``.model`` file of ``sentencepiece``."""

    def __init__(self, data: bytes, name: str = 'tokenizer.model') -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise TrainingError(f'--tokenizer {name} reads a sentencepiece model: {EXTRA}') from error
        try:
            self.made: Any = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DataError(f'--tokenizer {name} must be a sentencepiece model, got something else.') from error
        self.data = data
        self.size = int(self.made.get_piece_size())
        end = int(self.made.eos_id())
        self.end: int | None = end if end >= 0 else None

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        found: list[Sequence[int]] = self.made.encode([text.decode('utf-8', 'replace') for text in texts])
        return found

    def decode(self, ids: Sequence[int]) -> bytes:
        text: str = self.made.decode(list(ids))
        return text.encode()

    def digest(self) -> str:
        return hashlib.blake2b(self.data, digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        write_atomically(folder / 'tokenizer.model', self.data)


class Tiktoken:
    """A ``.tiktoken`` file of ranks: one base64 token and its rank in each line."""

    PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

    def __init__(self, data: bytes, name: str = 'tokenizer.tiktoken') -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise TrainingError(f'--tokenizer {name} reads ranks of tiktoken: {EXTRA}') from error
        import base64

        try:
            pairs = (line.split() for line in data.splitlines() if line.strip())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise DataError(
                f'--tokenizer {name} must hold a base64 token and a rank in each line, got something else.'
            ) from error
        self.data = data
        self.end: int | None = max(ranks.values(), default=-1) + 1
        self.size = self.end + 1
        self.made: Any = tiktoken.Encoding(name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={END: self.end})

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        found: list[Sequence[int]] = self.made.encode_ordinary_batch([text.decode('utf-8', 'replace') for text in texts])
        return found

    def decode(self, ids: Sequence[int]) -> bytes:
        found: bytes = self.made.decode_bytes(list(ids))
        return found

    def digest(self) -> str:
        return hashlib.blake2b(self.data, digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        write_atomically(folder / 'tokenizer.tiktoken', self.data)


FILES: dict[str, Any] = {
    'tokenizer.json': JsonTokenizer, 'tokenizer.model': SentencePiece, 'tokenizer.tiktoken': Tiktoken,
}  # fmt: skip


def load_tokenizer(path: Path) -> Tokenizer:
    """From a file, or from a folder that holds one under its usual name; a folder without one: bytes."""
    if path.is_dir():
        names = [name for name in FILES if (path / name).exists()]
        if not names:
            return Bytes()
        path = path / names[0]
    kind = FILES.get(f'tokenizer{path.suffix}')
    if kind is None:
        raise DataError(
            f'--tokenizer must be bytes, bpe, or a file that ends in .json, .model or .tiktoken, got {path}.'
        )  # fmt: skip
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f'--tokenizer {path} cannot be read: {error.strerror or error}') from error
    made: Tokenizer = kind(data, str(path))
    return made


def save_for_transformers(folder: Path, length: int) -> list[str]:
    """What ``transformers.AutoTokenizer`` reads beside a ``tokenizer.json``; its names. Where there is none: one of bytes.

    ``length``: of the longest text that the model reads.
    Errors: ``TrainingError`` if bytes need one and ``tokenizers`` is missing.
    """
    written = []
    if not (folder / 'tokenizer.json').exists():
        try:
            from tokenizers import Tokenizer as Made
            from tokenizers import decoders, models, pre_tokenizers
        except ImportError as error:
            raise TrainingError(f'a tokenizer of bytes is written with Hugging Face tokenizers: {EXTRA}') from error
        made: Any = Made(models.BPE(vocab={sign: byte for byte, sign in enumerate(signs_of_bytes())}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        write_atomically(folder / 'tokenizer.json', made.to_str().encode())
        written.append('tokenizer.json')
    if not (folder / 'tokenizer_config.json').exists():
        end = {'eos_token': END} if f'"{END}"' in (folder / 'tokenizer.json').read_text(encoding='utf-8') else {}
        told = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': length, **end}
        write_atomically(folder / 'tokenizer_config.json', json.dumps(told, indent=2).encode())
        written.append('tokenizer_config.json')
    return written


def signs_of_bytes() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself if it can be seen, else one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = itertools.count(256)
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


def train_bpe(texts: Iterable[bytes], vocabulary: int) -> JsonTokenizer:
    """A byte-level BPE (https://arxiv.org/abs/1508.07909) of so many tokens, from the first 100 MB of the texts.

    Errors: ``TrainingError`` without ``tokenizers``, or for a vocabulary that cannot hold all bytes.
    """
    try:
        from tokenizers import Tokenizer as Made
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise TrainingError(f'--tokenizer bpe trains with Hugging Face tokenizers: {EXTRA}') from error
    if vocabulary < 257:
        raise TrainingError(f'--vocab must be at least 257, for 256 bytes and the end of a document, got {vocabulary}.')
    made: Any = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )

    def some() -> Iterable[str]:
        total = 0
        for text in texts:
            yield text.decode('utf-8', 'replace')
            total += len(text)
            if total >= TRAIN_ON_BYTES:
                return

    made.train_from_iterator(itertools.chain(some()), trainer)
    return JsonTokenizer(made.to_str().encode(), 'bpe')
