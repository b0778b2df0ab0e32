"""Memory that nobody has filled holds NaN, so that a test sees a parameter or buffer that was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors


def poisonous(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def inner(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        if torch.compiler.is_compiling() or made.is_meta or not made.is_floating_point():
            return made
        with torch.no_grad():
            return made.fill_(float('nan'))

    return inner


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` give NaN where they would give anything."""
    # which constructors `with torch.device(...)` looks after is asked once: before they are replaced
    _device_constructors()
    places = [(torch, 'empty'), (torch, 'empty_like'), (Tensor, 'new_empty')]
    plain = [getattr(where, name) for where, name in places]
    for (where, name), make in zip(places, plain, strict=True):
        setattr(where, name, poisonous(make))
    try:
        yield
    finally:
        for (where, name), make in zip(places, plain, strict=True):
            setattr(where, name, make)
