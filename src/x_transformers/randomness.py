"""Random decisions about the course of a forward: skipped layers, number of repetitions, masked keys.

Processes that train one model together must decide alike, or they would wait for each other. By default the numbers are those
of Python's ``random``, so ``random.seed`` repeats them; ``decide_alike`` draws them from a seed and the number of the step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from x_transformers.helpers import default, pad_at_dim
from x_transformers.tensor_types import Bool, Int

_own: random.Random | None = None


def decide_alike(seed: int | None, step: int = 0) -> None:
    """Draw the decisions that follow from ``seed`` and ``step``, the same in every process; None: from Python's ``random``."""
    global _own
    # a tuple has no seed of its own, and a sum would give neighbouring seeds the same steps
    _own = None if seed is None else random.Random(f'{seed} {step}')


def happens(probability: float) -> bool:
    drawn = random.random() if _own is None else _own.random()
    return drawn < probability


def whole(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return random.randint(low, high) if _own is None else _own.randint(low, high)


def sorted_places(count: int, among: int, device: torch.device | None = None) -> Int[Tensor, ' n']:
    """``count`` different numbers from 0 to ``among`` - 1 in their order, every subset as likely as every other.

    Nobody waits for these, so they are drawn as dropout is, from torch's generator of the device: ``torch.manual_seed`` repeats
    them, and a compiled program draws them too.
    """
    return torch.randperm(among, device=device)[:count].sort().values


def forgetful_mask(inputs: Int[Tensor, 'b n'], share: float, front: int, given: Mapping[str, Any]) -> Bool[Tensor, 'b m']:
    """Which keys may be seen, of those that the caller's masks show: for the net this mask takes their place.

    A ``share`` of the tokens, never the first, is hidden; the ``front`` rows in front of them are not.
    """
    n = inputs.shape[1]
    rand = torch.randn(inputs.shape, device=inputs.device)
    rand[:, 0] = -torch.finfo(rand.dtype).max
    hidden = rand.topk(min(int(n * share), n - 1), dim=-1).indices
    visible = torch.ones_like(inputs, dtype=torch.bool).scatter(1, hidden, False)
    visible, before = pad_at_dim(visible, (front, 0), value=True), given.get('prepend_mask')
    shown = default(given.get('self_attn_kv_mask'), given.get('mask'))
    if shown is not None:
        visible = visible & pad_at_dim(shown, (visible.shape[1] - shown.shape[1], 0), value=True)
    return visible if before is None else visible & pad_at_dim(before, (0, inputs.shape[1]), value=True)
