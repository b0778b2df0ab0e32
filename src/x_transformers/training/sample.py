"""Bytes as they are sampled, one at a time, so that they can be shown while the rest is still to come."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.generation import sampling
from x_transformers.training.build import reading_arguments
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
    if not prompt:
        raise TrainingError('the prompt is empty: the model needs a byte to start from')
    writer: Any = model
    device = next(model.parameters()).device

    def filtered(logits: Tensor) -> Tensor:
        if top_k is not None:
            logits = sampling.top_k(logits, k=top_k)
        if top_p is not None:
            logits = sampling.top_p(logits, thres=top_p)
        return logits if min_p is None else sampling.min_p(logits, min_p=min_p)

    ids = torch.tensor([list(prompt)], device=device)
    for token in writer.generate(
        ids, length, temperature=temperature, filter_logits_fn=filtered, stream=True, **reading_arguments(model)
    ):  # fmt: skip
        yield bytes([int(token)])


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
