"""Random decisions about the course of a forward: whether a layer is left out, how often the stack is run.

Processes that train one model together must decide alike, or they would wait for each other. By default the numbers are those
of Python's ``random``, so ``random.seed`` repeats them; ``decide_alike`` draws them from a seed and the number of the step.
"""

from __future__ import annotations

import random

import torch

from x_transformers.tensor_types import Int

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


def sorted_places(count: int, among: int, device: torch.device | None = None) -> Int[torch.Tensor, ' n']:
    """``count`` different numbers from 0 to ``among`` - 1 in their order, every subset as likely as every other.

    Nobody waits for these, so they are drawn as dropout is, from torch's generator of the device: ``torch.manual_seed`` repeats
    them, and a compiled program draws them too.
    """
    return torch.randperm(among, device=device)[:count].sort().values
