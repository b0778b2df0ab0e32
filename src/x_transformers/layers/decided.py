"""Flags that a class of stacks sets itself, and flags of another stack that must agree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from x_transformers.flags.base import FlagError
from x_transformers.flags.stack import StackFlags


class Decides(Protocol):
    """A class of stacks."""

    decides: ClassVar[Mapping[str, bool]]


def with_own(cls: type[Decides], kwargs: Any) -> dict[str, Any]:
    """The flags of a subclass; raise FlagError if someone gives what it sets by itself."""
    taken = [f'`{flag}`' for flag in cls.decides if flag in kwargs]
    if taken:
        raise FlagError(
            f'{" and ".join(taken)} must be left out for {cls.__name__}, which sets it. Leave it out, or use '
            'AttentionLayers, Encoder (sees both ways), Decoder (causal), PrefixDecoder or CrossAttender.'
        )
    return {**kwargs, **cls.decides}


def keywords_of_flags(cls: type[Decides], flags: StackFlags) -> dict[str, Any]:
    """What the constructor of ``cls`` must be given for these flags; raise FlagError if they say otherwise than the class."""
    keywords = flags.keywords()
    for name, value in cls.decides.items():
        if (flag := getattr(flags, name)) != value:
            raise FlagError(f'flags must have {name}={value} for {cls.__name__}, got {flag}. Use AttentionLayers.from_flags.')
        keywords.pop(name, None)
    # those that the constructor may have other defaults for
    own = inspect.signature(cls.__init__).parameters
    return {name: getattr(flags, name) for name in flags.flag_fields() if name in own} | keywords
