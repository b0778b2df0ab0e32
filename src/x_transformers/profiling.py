"""Module names in a profile: which module an operation belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

# the stack calls these on branches, attention on its scores; what has neither is called as a module
METHODS = ('run', 'forward')
# where torch's own modules are named, too
SLOTS = ('to_logits', 'project_emb', 'to_out')


@contextmanager
def annotate(model: nn.Module, *, paths: bool = False) -> Iterator[nn.Module]:
    """Inside, every module of ``model`` has its name in ``torch.profiler``: ``module: Attention``, ``module: Attend``, …

    ``paths``: also where in the model it is, ``module: Attention attn_layers.layers.0.1``. Nothing is left of it afterwards,
    and a model that is not annotated pays nothing. Only the forward is named: a backward runs outside of the modules.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        for path, module in model.named_modules():
            method = entrance_of(path, module)
            if method is None or method in vars(module):
                continue
            name = f'module: {label_of(path, module)}' + (f' {path}' if paths and path else '')
            setattr(module, method, recorded(getattr(module, method), name))
            changed.append((module, method))
        yield model
    finally:
        for module, method in changed:
            delattr(module, method)


def entrance_of(path: str, module: nn.Module) -> str | None:
    """The method through which the rest of the model enters this module; None if it is not named."""
    own = type(module).__module__.startswith('x_transformers.')
    if not own and path.rpartition('.')[2] not in SLOTS:
        return None
    return next((name for name in METHODS if callable(getattr(module, name, None)) and not is_whole(module, name)), None)


def is_whole(module: nn.Module, method: str) -> bool:
    """Models have a ``run``, too, but are called as modules."""
    return method == 'run' and hasattr(module, 'attn_layers')


def label_of(path: str, module: nn.Module) -> str:
    own = type(module).__module__.startswith('x_transformers.')
    return type(module).__name__ if own else path.rpartition('.')[2]


def recorded(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(call)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return call(*args, **kwargs)

    return inner
