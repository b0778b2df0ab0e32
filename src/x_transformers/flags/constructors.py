"""The keywords that constructors take: groups of flags, from which signatures, ``help`` and typed keywords are generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

from x_transformers.flags.base import REQUIRED, Flags, as_tuple, default_of, shown
from x_transformers.flags.parts import PARTS, reserved
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags

ENCODER, DECODER = 'enc_', 'dec_'
# what an encoder-decoder decides by itself
SET_FOR_MODEL = ('attn_layers', 'return_only_embed')
SET_FOR_STACK = ('dim', 'causal', 'cross_attend', 'only_cross')


class Group(NamedTuple):
    """The flags of one class under a prefix: all but those that the constructor decides by itself."""

    flags: type[Flags]
    prefix: str = ''
    without: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """As the class has them, without the prefix."""
        return [name for name in self.flags.flag_fields() if name not in self.without]

    def keywords(self) -> list[str]:
        """As the constructor takes them."""
        return [self.prefix + name for name in self.names()]

    def parameters(self) -> Iterator[inspect.Parameter]:
        parameters = self.flags.signature().parameters
        for name in self.names():
            yield parameters[name].replace(name=self.prefix + name, kind=inspect.Parameter.KEYWORD_ONLY)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(keyword, a line for people: its kind, its default, what it does and where it comes from)."""
        for name in self.names():
            field = self.flags.flag_fields()[name]
            default = default_of(field)
            kind = field.type if default is REQUIRED else f'{field.type} = {shown(default)}'
            sentence = ' '.join((field.metadata['says'], *as_tuple(field.metadata['paper'])))
            yield self.prefix + name, f'{self.prefix}{name} ({kind}): {sentence}'


Groups = tuple[Group, ...]


def only(flags: type[Flags], *without: str) -> Groups:
    """The flags of one class."""
    return (Group(flags, without=frozenset(without)),)


def stack(*without: str, prefix: str = '') -> Groups:
    """The flags of a stack and, with their own prefixes, of its parts. ``without``: as a stack's keywords are written."""
    own = Group(StackFlags, prefix, frozenset(without))
    parts = (
        Group(cls, prefix + part, frozenset({*reserved(part), *(name.removeprefix(part) for name in without)}))
        for part, cls in PARTS.items()
    )
    return (own, *parts)


def side(prefix: str) -> Groups:
    """One side of an encoder-decoder: its model and its stack."""
    model = Group(WrapperFlags, prefix, frozenset(SET_FOR_MODEL))
    return (model, *stack(*SET_FOR_STACK, prefix=prefix))


STACK = stack()
# of models that build an encoder and a decoder from the same keywords, and say the rest by themselves
SHARED = stack('dim', 'depth', 'heads', 'causal', 'cross_attend', 'only_cross', 'attn_dim_head')
# the same of a model that also says which of its stacks end in a norm
INNER = stack('dim', 'depth', 'heads', 'causal', 'cross_attend', 'only_cross', 'attn_dim_head', 'pre_norm_has_final_norm')
PAIR = (*side(ENCODER), *side(DECODER))
