"""Warnings that point at the line of the user, not at a line in here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from pathlib import Path

import torch

# calling a module, or a function without gradients, passes through a few frames of torch
INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class InertFlagWarning(UserWarning):
    """Keywords that do nothing, because another keyword that would give them effect is off.

    ``warnings.filterwarnings('error', category=InertFlagWarning)`` turns it into an error.
    """


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first frame outside of this package and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


# what constructors inside of another constructor have found: it warns for all of them
_collected: ContextVar[list[str] | None] = ContextVar('collected', default=None)
# how the outer constructor's user writes a keyword of the inner one
_rename: ContextVar[Callable[[str], str]] = ContextVar('rename', default=str)


def warn_inert(where: str, sentences: Iterable[str]) -> None:
    """One ``InertFlagWarning`` with all sentences; inside ``one_warning`` they are left to the outer constructor."""
    found = list(dict.fromkeys(sentences))
    collected = _collected.get()
    if collected is not None:
        collected.extend(found)
    elif found:
        subject = 'a keyword has' if len(found) == 1 else f'{len(found)} keywords have'
        warn_user(f'{where}: {subject} no effect. ' + ' '.join(found), InertFlagWarning)


class one_warning:
    """A constructor that calls others: one warning for all of them, in its own name."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        self.found: list[str] = []
        self.outermost = _collected.get() is None
        if self.outermost:
            self.token: Token[list[str] | None] = _collected.set(self.found)

    def __exit__(self, kind: object, *rest: object) -> None:
        if not self.outermost:
            return
        _collected.reset(self.token)
        if kind is None:
            warn_inert(self.where, self.found)


class renamed:
    """Inside, keywords are named in warnings as ``rename`` writes them: ``enc_depth``."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename

    def __enter__(self) -> None:
        outer, rename = _rename.get(), self.rename
        self.token = _rename.set(lambda name: outer(rename(name)))

    def __exit__(self, *raised: object) -> None:
        _rename.reset(self.token)


def written(name: str) -> str:
    """A keyword as the user of the outermost constructor writes it."""
    return _rename.get()(name)
