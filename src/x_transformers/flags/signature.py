"""Generated ``inspect.signature`` and ``help`` of constructors with ``**flags``, and of forwards with many arguments."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from x_transformers.flags.constructors import Groups

F = TypeVar('F', bound=Callable[..., Any])

OPEN = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class ClassSignature:
    """The constructor's own parameters, and one for each flag in place of ``**flags``: ``__signature__ = ClassSignature(...)``.

    A subclass with a constructor of its own has that one's signature.
    """

    def __init__(self, groups: Groups, *fixed: str) -> None:
        self.groups = groups
        # the flags that the class sets by itself
        self.fixed = fixed

    def __set_name__(self, owner: Any, name: str) -> None:
        self.home = owner
        owner.__doc__ = KeywordDoc(owner.__doc__, self)

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None or owner.__init__ is not self.home.__init__:
            raise AttributeError('__signature__')
        return self.signature()

    def signature(self) -> inspect.Signature:
        _, *own = inspect.signature(self.home.__init__).parameters.values()
        listed = {parameter.name: parameter for parameter in own if parameter.kind not in OPEN}
        for group in self.groups:
            for parameter in group.parameters():
                if parameter.name not in self.fixed:
                    listed.setdefault(parameter.name, parameter)
        return inspect.Signature(list(listed.values()))


class KeywordDoc:
    """The docstring of such a class: what its source says, then a sentence for each keyword. Made when somebody reads it."""

    def __init__(self, text: str | None, signature: ClassSignature) -> None:
        self.text = text
        self.of = signature

    def __get__(self, instance: Any, owner: Any) -> str | None:
        if self.text is None:
            # Python was told to drop docstrings
            return None
        taken = self.of.signature().parameters
        lines = [f'    {line}' for group in self.of.groups for name, line in group.lines() if name in taken]
        return '\n'.join((inspect.cleandoc(self.text), '', 'Keywords:', *lines))


def with_arguments(*tables: Mapping[str, str]) -> Callable[[F], F]:
    """Put a line for each argument of a forward in the place of the line ``Args: …`` of its docstring.

    Args:
        tables: what an argument does, by its name; the first that has a name says it.
    """
    sentences = ChainMap(*map(dict, tables))

    def described(forward: F) -> F:
        # Python may have been told to drop docstrings
        if forward.__doc__ is not None:
            listed = [
                textwrap.fill(f'{name}: {sentences[name]}', 120, initial_indent=' ' * 4, subsequent_indent=' ' * 8)
                for name in inspect.signature(forward).parameters
                if name in sentences
            ]
            lines = '\n'.join(('Args:', *listed))
            forward.__doc__ = re.sub(r'^Args: .*$', lambda _: lines, inspect.cleandoc(forward.__doc__), flags=re.MULTILINE)
        return forward

    return described
