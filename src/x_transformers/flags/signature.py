"""What ``inspect.signature`` and ``help`` show of a class whose constructor takes its flags as ``**flags``."""

from __future__ import annotations

import inspect
from typing import Any

from x_transformers.flags.base import Flags


class ClassSignature:
    """The constructor's own parameters, and one for each flag in place of ``**flags``: ``__signature__ = ClassSignature(...)``.

    A subclass with a constructor of its own has that one's signature.
    """

    def __init__(self, flags: type[Flags], *fixed: str) -> None:
        self.flags = flags
        # the flags that the class sets by itself
        self.fixed = fixed

    def __set_name__(self, owner: Any, name: str) -> None:
        self.home = owner

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None or owner.__init__ is not self.home.__init__:
            raise AttributeError('__signature__')
        _, *own = inspect.signature(owner.__init__).parameters.values()
        flags = self.flags.signature()
        parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = {parameter.name for parameter in parameters}.union(self.fixed)
        for name, parameter in flags.parameters.items():
            rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
            if name not in shown:
                parameters.append(parameter if rest else parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        return flags.replace(parameters=parameters)
