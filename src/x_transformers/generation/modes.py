"""Evaluation mode during generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

from x_transformers.module import modes

P = ParamSpec('P')
R = TypeVar('R')


class evaluating:
    """Evaluation mode; afterwards, exceptions included, every submodule has the mode it had.

    Several may be open at a time, in one thread or in several: the modes come back when the last one ends. Where somebody calls
    ``train()`` or ``eval()`` in the meantime, that is what holds afterwards.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self.roots = roots

    def __enter__(self) -> evaluating:
        # the modules of now: a part that is put in later has a mode of its own
        self.modules = list(dict.fromkeys(module for root in self.roots for module in root.modules()))
        modes.open(self.modules)
        try:
            self._eval()
        except BaseException:
            modes.close(self.modules)
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        modes.close(self.modules)

    def again(self) -> None:
        """Back to evaluation mode, if somebody has called ``train()`` since."""
        if self.seen != modes.changes or any(root.training for root in self.roots):
            self._eval()

    def _eval(self) -> None:
        self.seen = modes.changes
        with modes.unseen():
            for root in self.roots:
                root.eval()


def eval_decorator(fn: Callable[P, R]) -> Callable[P, R]:
    """A method that runs in evaluation mode; every submodule's mode is restored, after exceptions too."""

    @wraps(fn)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        owner = args[0]
        if not isinstance(owner, nn.Module):
            raise TypeError(
                f'eval_decorator must be put on a method of a module, got one of {type(owner).__name__}. Derive it from '
                'torch.nn.Module.'
            )
        with evaluating(owner):
            return fn(*args, **kwargs)

    return inner
