"""Warnings that point at the line of the user's code."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import wraps
from pathlib import Path
from typing import ParamSpec

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


@contextmanager
def unlogged() -> Iterator[None]:
    """Models that are built in here say nothing of their flags: they are forms of one that says it."""
    logger = logging.getLogger(__package__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# what constructors inside of another constructor have found: it warns for all of them
_collected: ContextVar[list[str] | None] = ContextVar('collected', default=None)
# how the outer constructor's user writes a keyword of the inner one
_rename: ContextVar[Callable[[str], str]] = ContextVar('rename', default=str)


def warn_inert(where: str, sentences: Iterable[str]) -> None:
    """One ``InertFlagWarning`` with all sentences; inside ``one_warning`` they are left to the outer constructor."""
    unique = list(dict.fromkeys(sentences))
    collected = _collected.get()
    if collected is not None:
        collected.extend(unique)
    elif unique:
        subject = 'a keyword has' if len(unique) == 1 else f'{len(unique)} keywords have'
        warn_user(f'{where}: {subject} no effect. ' + ' '.join(unique), InertFlagWarning)


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


P = ParamSpec('P')


def told_once(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that calls others: one warning for all of them, in the name of its class."""

    @wraps(init)
    def inner(*args: P.args, **kwargs: P.kwargs) -> None:
        with one_warning(type(args[0]).__name__):
            init(*args, **kwargs)

    return inner


class kept_back:
    """What constructors in here find without effect, for the outer one to judge."""

    def __enter__(self) -> list[str]:
        self.found: list[str] = []
        self.token = _collected.set(self.found)
        return self.found

    def __exit__(self, *raised: object) -> None:
        _collected.reset(self.token)


def warn_inert_in_all(where: str, parts: Iterable[tuple[list[str], Iterable[str]]]) -> None:
    """Warn of keywords that several parts were given, if they do nothing in any of them.

    ``parts``: (the sentences of a part, the keywords that only it was given, which count by themselves).
    """
    every = list(parts)
    common = set.intersection(*(set(sentences) for sentences, _ in every)) if every else set()
    own = [s for sentences, names in every for s in sentences if s in common or any(f'`{name}' in s for name in names)]
    warn_inert(where, own)


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
