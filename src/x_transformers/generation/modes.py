"""Evaluation mode while something is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

P = ParamSpec('P')
R = TypeVar('R')


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, exceptions included, every submodule has the mode it had."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            root.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def eval_decorator(fn: Callable[P, R]) -> Callable[P, R]:
    """A method that runs in evaluation mode; every submodule's mode is restored, after exceptions too."""

    @wraps(fn)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        owner = args[0]
        if not isinstance(owner, nn.Module):
            raise TypeError(f'eval_decorator is for methods of modules, got {type(owner).__name__}')
        with evaluating(owner):
            return fn(*args, **kwargs)

    return inner
