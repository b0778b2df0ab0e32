"""Streaming of sampled text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.generation import sampling
from x_transformers.tensor_types import Float
from x_transformers.training.build import device_of, network_of, reading_arguments
from x_transformers.training.errors import TrainingError
from x_transformers.training.tokens import Bytes, Tokenizer

TOP_P = 0.95


def sample_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = TOP_P,
    min_p: float | None = None,
) -> Iterator[bytes]:
    """``length`` tokens after ``prompt``, each as soon as it is known. ``temperature`` 0 takes the most likely token.

    The filters are applied one after the other to the scores as the model gives them; temperature comes last. Text beyond the
    model's ``max_seq_len`` is forgotten from its beginning.
    """
    ids = list(tokenizer.encode([prompt])[0])
    if not ids:
        raise TrainingError('prompt must have at least one token to start from, got none. Give some text.')
    writer: Any = model
    device = device_of(model)

    def filtered(logits: Float[Tensor, 'b v']) -> Float[Tensor, 'b v']:
        if top_k is not None:
            logits = sampling.top_k(logits, k=min(top_k, logits.shape[-1]))
        if top_p is not None:
            logits = sampling.top_p(logits, thres=top_p)
        return logits if min_p is None else sampling.min_p(logits, min_p=min_p)

    net: Any = network_of(model)
    beyond = bool(getattr(net, 'max_seq_len', 0)) and len(ids) + length > net.max_seq_len
    # a table of positions ends there, and cached keys carry theirs: then the window is read anew for every token
    caches = not beyond or bool(getattr(net, 'can_cache_kv_outside_max_seq_len', True))
    told = ids_told = 0
    for token in writer.generate(
        torch.tensor([ids], device=device), length, temperature=temperature, filter_logits_fn=filtered, stream=True,
        cache_kv=caches, **reading_arguments(model),
    ):  # fmt: skip
        new = int(token)
        if isinstance(tokenizer, Bytes):
            yield bytes([new])
            continue
        # a token may be a part of a character, or look different behind another one: what is told is the text's growth
        ids.append(new)
        if not told and not ids_told:
            told, ids_told = len(tokenizer.decode(ids[:-1])), 1
        text = tokenizer.decode(ids)
        if not text.endswith('\ufffd'.encode()):
            yield text[told:]
            told = len(text)


def as_text(pieces: Iterator[bytes]) -> Iterator[str]:
    """UTF-8 as it comes: a character is given once its last byte is there, a broken one as a replacement character."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text
    rest = decoder.decode(b'', final=True)
    if rest:
        yield rest
