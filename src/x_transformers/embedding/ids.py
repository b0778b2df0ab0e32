"""Conversion of token ids of any dtype to int64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.helpers import values_known
from x_transformers.notices import warn_user
from x_transformers.tensor_types import Bool, Int


def token_ids(ids: Any, name: str = 'x') -> Int[Tensor, '...']:
    """Ids as int64: a byte cannot hold ``ignore_index=-100``, and several operations know no other integers.

    Whole numbers of floating dtype are taken with a warning, as the original takes them. Raises TypeError for anything else.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f'{name} must be a tensor of token ids, got a {type(ids).__name__}. Make one by torch.tensor(...).')
    if ids.is_complex() or ids.dtype == torch.bool or ids.is_quantized:
        raise TypeError(f'{name} must be integers, which token ids are, got a tensor of {ids.dtype}.')
    if not ids.is_floating_point():
        return ids.long()
    if not values_known(ids):
        return ids.long()
    if ids.requires_grad or not bool((ids == ids.trunc()).all()) or not bool(ids.isfinite().all()):
        raise TypeError(
            f'{name} must be integers, got a tensor of {ids.dtype} whose numbers are not whole; '
            'continuous inputs go through ContinuousTransformerWrapper.'
        )
    warn_user(f'{name} must be integers, got whole numbers of {ids.dtype}, which are read as integers. Call .long() on them.')
    return ids.long()


def training_ids(x: Any, name: str = 'x') -> Int[Tensor, 'b n']:
    """A batch of ids with something to predict in every row."""
    ids: Tensor = token_ids(x, name)
    if ids.ndim != 2:
        raise ValueError(f'{name} must be token ids (batch, sequence), got shape {tuple(ids.shape)}')
    if ids.shape[1] < 2:
        raise ValueError(f'{name} must hold at least two tokens per row, one to read and one to predict; got {ids.shape[1]}')
    return ids


def beyond(x: Int[Tensor, 'b n'], lens: Int[Tensor, 'b']) -> Bool[Tensor, 'b n']:
    """True for what is behind each row's length."""
    if not isinstance(lens, Tensor) or lens.is_floating_point() or lens.shape != x.shape[:1]:
        got = tuple(lens.shape) if isinstance(lens, Tensor) else type(lens).__name__
        raise ValueError(f'lens must be one whole number per row, ({x.shape[0]},), got {got}.')
    return torch.arange(x.shape[1], device=x.device) >= lens[:, None]
