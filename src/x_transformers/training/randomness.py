"""All random generators that a model or its data may use: seeded, saved and restored together."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def seed_everything(seed: int) -> None:
    """Seed Python's ``random``, torch on every device, and NumPy's global generator if NumPy has been imported."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get('numpy')
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """The state of these generators, in types that ``torch.load(weights_only=True)`` accepts."""
    state: dict[str, Any] = {'python': random.getstate(), 'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get('numpy')
    if numpy is not None:
        kind, keys, position, has_gauss, gauss = numpy.random.get_state()
        state['numpy'] = (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss))
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available() and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])
    numpy = sys.modules.get('numpy')
    if numpy is not None and 'numpy' in state:
        kind, keys, *rest = state['numpy']
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
