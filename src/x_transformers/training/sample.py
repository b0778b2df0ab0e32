"""Bytes as they are sampled, one at a time, so that they can be shown while the rest is still to come."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.training.build import network_of
from x_transformers.training.errors import TrainingError


def sample_bytes(
    model: nn.Module,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = 0.05,
) -> Iterator[bytes]:
    """``length`` bytes after ``prompt``, each as soon as it is known. ``temperature`` 0 takes the most likely byte.

    The filters are applied one after the other to the scores as the model gives them; temperature comes last. Text beyond the
    model's ``max_seq_len`` is forgotten from its beginning.
    """
    from x_transformers.generation.decode import Reader, Tokens, evaluating

    if not prompt:
        raise TrainingError('the prompt is empty: the model needs a byte to start from')
    net: Any = network_of(model)
    device = next(model.parameters()).device
    beyond = bool(net.max_seq_len) and len(prompt) + length > net.max_seq_len
    # a table of positions ends there, and cached keys carry theirs: then the window is read anew for every byte
    reader = Reader(net, cache=not beyond or net.can_cache_kv_outside_max_seq_len, expected=length)
    tokens = Tokens(torch.tensor(list(prompt), device=device)[None], room=length)
    with evaluating(model):
        for _ in range(length):
            with torch.no_grad():
                token = pick(reader.read(tokens)[:, -1], temperature, top_k, top_p, min_p)
            tokens.append(token)
            yield bytes([int(token)])


def pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    from x_transformers.generation import sampling

    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        logits = sampling.top_k(logits, k=top_k)
    if top_p is not None:
        logits = sampling.top_p(logits, thres=top_p)
    if min_p is not None:
        logits = sampling.min_p(logits, min_p=min_p)
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1)[:, 0]


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
