"""The flags of a stack: those of ``across_layers.py`` and the files below it, with the flags of its parts.

``layer(index)`` are the flags of one layer, ``attentions`` and ``cross_attentions`` those of all layers with heads, for flags
that differ between layers. ``self_attention_flags(first=...)`` are those of a self-attention module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from x_transformers.flags.across_layers import AcrossFlags
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError, type_hints
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.layered import split_by_layer
from x_transformers.flags.parts import PARTS, cross_inherits, first_prefix, keyword_names, reserved, split_parts
from x_transformers.flags.per_layer import PerLayer, takes

CROSS_NAMES = frozenset(keyword_names('cross_attn_'))


@dataclass(frozen=True, kw_only=True, repr=False)
class StackFlags(AcrossFlags):
    """Every keyword of ``AttentionLayers``; the parts' keywords come with ``attn_``, ``cross_attn_`` and ``ff_`` in front."""

    attention: AttentionFlags = field(default_factory=AttentionFlags)
    cross_attention: AttentionFlags = field(default_factory=AttentionFlags)
    feedforward: FeedForwardFlags = field(default_factory=FeedForwardFlags)
    # the names that were given with cross_attn_ in front; the others came from attn_
    cross_given: frozenset[str] = frozenset()
    # keywords with a value for each layer of their kind; the fields hold those of the first
    varying: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # the names that were given with attn_ and ff_ in front
    attn_given: frozenset[str] = frozenset()
    ff_given: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, where: str = 'AttentionLayers', prefix: str = '') -> Self:
        """Flags of a stack and its parts from flat keywords: ``attn_`` for attention, ``cross_attn_`` laid over it for cross
        attention, ``ff_`` for feed-forwards. Errors as ``Flags.parse``; a name that only the stack may set
        (``attn_heads``) is unknown."""
        own, parts = split_parts(given, cls.flag_fields(), where=where, prefix=prefix)
        cls.check_complete(own, where=where, prefix=prefix)
        apart: dict[str, PerLayer] = {}
        own = split_by_layer(own, cls, '', apart, own=True)
        for part, part_flags in PARTS.items():
            parts[part] = split_by_layer(parts[part], part_flags, part, apart)
        values, wrong = cls.read(own, where=where, prefix=prefix)
        read: dict[str, dict[str, Any]] = {}
        for part, part_flags in PARTS.items():
            read[part], more = part_flags.read(parts[part], where=where, prefix=prefix + part)
            wrong += more
        if wrong:
            raise FlagError(*wrong)
        stack = cls(**values)
        if stack.scales_by_depth:
            apart = stack.depths(parts) | apart
        varying = stack.spread(apart, prefix)
        for name, over in varying.items():
            part = first_prefix(name) or ''
            if part and name not in cls.flag_fields():
                read[part][name.removeprefix(part)] = over[0]
            else:
                value: Any = over if takes(type_hints(cls)[name])[0] else over[0]
                stack = dataclasses.replace(stack, **{name: value})
        inherited = {
            name: value
            for name, value in read['attn_'].items()
            if f'attn_{name}' not in varying and cross_inherits(name, read['cross_attn_'])
        }
        read = {part: stack.keywords_of_part(part, its) for part, its in read.items()}
        return dataclasses.replace(
            stack,
            attention=AttentionFlags(**stack.attention_keywords, **read['attn_']),
            cross_attention=AttentionFlags(heads=stack.heads, **(inherited | read['cross_attn_'])),
            feedforward=FeedForwardFlags(**read['ff_']),
            cross_given=frozenset(name.removeprefix('cross_attn_') for name in given if name in CROSS_NAMES),
            varying={name: over for name, over in varying.items() if getattr(stack, name, None) != over},
            attn_given=given_to('attn_', given),
            ff_given=given_to('ff_', given),
        )

    @classmethod
    def switched_on(cls, name: str) -> dict[str, Any]:
        part = first_prefix(name)
        if name in cls.flag_fields() or part is None:
            return super().switched_on(name)
        own = PARTS[part].switched_on(name.removeprefix(part))
        return {each if each in reserved(part) else part + each: value for each, value in own.items()}


def given_to(part: str, given: Mapping[str, Any]) -> frozenset[str]:
    """The names of a part's keywords among those of its stack."""
    known = frozenset(keyword_names(part))
    return frozenset(name.removeprefix(part) for name in given if name in known)
