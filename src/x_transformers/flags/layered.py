"""Flags of a stack that differ between layers, and the value that applies to each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self, Union, get_origin

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError, Flags, kinds_of, type_hints
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.parts import PARTS, first_prefix
from x_transformers.flags.per_layer import PerLayer, as_per_layer, spread, takes
from x_transformers.layers.plan import KINDS, block_numbers, plan_kinds

# which layers a flag of the stack may be told apart for
KINDS_OF = {'attention': 'ac', 'mixer': 'm'}
KIND_OF_PART = {'attn_': 'a', 'cross_attn_': 'c', 'ff_': 'f'}


class LayeredFlags(Flags):
    """Base of the flags of a stack: its fields hold the values of the first layers, ``varying`` those of all.

    Whoever builds or checks a layer asks ``layer(index)``, where every flag has one value.
    """

    attention: AttentionFlags
    cross_attention: AttentionFlags
    feedforward: FeedForwardFlags
    varying: Mapping[str, tuple[Any, ...]]
    attn_given: frozenset[str]
    cross_given: frozenset[str]
    ff_given: frozenset[str]
    attention_keywords: Any

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The letter of each layer."""
        stack: Any = self
        return plan_kinds(stack)

    def spread(self, apart: Mapping[str, PerLayer], prefix: str = '') -> dict[str, tuple[Any, ...]]:
        """The keywords in ``apart``, with a value for each layer that they are for.

        Raises FlagError for those that do not fit.
        """
        kinds = self.kinds if apart else ()
        varying: dict[str, tuple[Any, ...]] = {}
        wrong: list[str] = []
        for name, given in apart.items():
            if name in self.flag_fields():
                hint, each = type_hints(type(self))[name], self.flag_fields()[name].metadata['each']
                if each is None:
                    wrong.append(f'`{prefix}{name}` must be one value for the whole stack, got one per layer. Give one value.')
                    continue
                kind = '' if each == 'layer' else each
                counts = {'attention': max(kinds.count('a'), kinds.count('c')), 'mixer': kinds.count('m')}
                layers = counts.get(kind, len(kinds))
                if takes(hint)[0]:
                    # its own tuple already holds one value for each layer
                    one = [single for single in kinds_of(hint) if get_origin(single) is not tuple]
                    hint = Union[tuple(one)]  # noqa: UP007
            else:
                part = first_prefix(name) or ''
                hint = type_hints(PARTS[part])[name.removeprefix(part)]
                kind = KINDS[KIND_OF_PART[part]]
                layers = kinds.count(KIND_OF_PART[part])
            varying[name], more = spread(given, layers, hint, name=prefix + name, kind=kind)
            wrong += more
        if wrong:
            raise FlagError(*wrong)
        return varying

    def depths(self, given: Mapping[str, Mapping[str, Any]]) -> dict[str, PerLayer]:
        """``output_proj_depth`` of each layer, its block counted from 1, for the parts that are not ``given`` one."""
        stack: Any = self
        numbers = block_numbers(stack)
        depths = {}
        for part, kind in KIND_OF_PART.items():
            own = tuple(number for number, its in zip(numbers, self.kinds, strict=True) if its == kind)
            if own and 'output_proj_depth' not in given[part]:
                depths[f'{part}output_proj_depth'] = PerLayer(values=own)
        return depths

    def layer(self, index: int) -> Self:
        """The flags of layer ``index``: every flag has the one value that holds there, its own part's flags too."""
        return self.by_layer[index] if self.varying and index < len(self.by_layer) else self

    @cached_property
    def by_layer(self) -> tuple[Self, ...]:
        """The flags of each layer, in the order of ``plan_kinds``."""
        return tuple(map(self._of_layer, range(len(self.kinds))))

    def varying_at(self, index: int) -> dict[str, Any]:
        """The keywords that differ between layers and concern layer ``index``, with their values there."""
        kinds = self.kinds
        kind, nth = kinds[index], kinds[:index].count(kinds[index])
        values_here = {}
        for name, values in self.varying.items():
            each = self.flag_fields()[name].metadata['each'] if name in self.flag_fields() else None
            if each == 'layer':
                values_here[name] = values[index]
            elif KIND_OF_PART[first_prefix(name) or ''] == kind if each is None else kind in KINDS_OF[each]:
                values_here[name] = values[nth % len(values)]
        return values_here

    def _of_layer(self, index: int) -> Self:
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in self.varying_at(index).items():
            if name in self.flag_fields():
                own[name] = value
            else:
                part = first_prefix(name) or ''
                parts[part][name.removeprefix(part)] = value
        stack: Any = self
        flags = dataclasses.replace(stack, varying={}, **own)
        of_layer: Self = dataclasses.replace(
            flags,
            attention=dataclasses.replace(self.attention, **flags.attention_keywords, **parts['attn_']),
            cross_attention=dataclasses.replace(self.cross_attention, heads=flags.heads, **parts['cross_attn_']),
            feedforward=dataclasses.replace(self.feedforward, **parts['ff_']),
        )
        return of_layer

    def _of_kind(self, kind: str) -> list[Self]:
        if not self.varying:
            return [self]
        return [flags for flags, its_kind in zip(self.by_layer, self.kinds, strict=True) if its_kind == kind]

    @cached_property
    def attentions(self) -> tuple[AttentionFlags, ...]:
        """The flags of each self attention; one entry where they are the same."""
        return tuple(flags.attention for flags in self._of_kind('a'))

    @cached_property
    def cross_attentions(self) -> tuple[AttentionFlags, ...]:
        """The flags of each cross attention; one entry where they are the same."""
        return tuple(flags.cross_attention for flags in self._of_kind('c'))

    @cached_property
    def expert_loss(self) -> bool:
        """Whether there are experts that give a loss in training."""
        return any(flags.feedforward.expert_loss for flags in self._of_kind('f'))

    def differs(self, *names: str) -> bool:
        """Whether one of these derived values or flags of self attention is not the same in all layers."""
        return any(len({getattr(flags, name) for flags in self.attentions}) > 1 for name in names)

    def cross_differs(self, *names: str) -> bool:
        """The same of cross attention."""
        return any(len({getattr(flags, name) for flags in self.cross_attentions}) > 1 for name in names)

    def changed(self) -> dict[str, Any]:
        return super().changed() | dict(self.varying)

    def keywords(self) -> dict[str, Any]:
        own = {name: value for name, value in Flags.changed(self).items() if name not in self.varying}
        typed = {'attn_': self.attn_given, 'cross_attn_': self.cross_given, 'ff_': self.ff_given}
        held = {'attn_': self.attention, 'cross_attn_': self.cross_attention, 'ff_': self.feedforward}
        parts = {part + name: getattr(held[part], name) for part in PARTS for name in sorted(typed[part])}
        # others follow from flags, as the depth of layers does
        named = {*parts, *self.flag_fields()}
        return own | parts | {name: PerLayer(values=over) for name, over in self.varying.items() if name in named}

    def is_changed(self, name: str) -> bool:
        if name == 'attn_dim_head':
            # derived, and a flag of the part as well
            return name in self.varying or self.attention.is_changed('dim_head')
        return name in self.varying or super().is_changed(name)


def split_by_layer(
    given: Mapping[str, Any], cls: type[Flags], prefix: str, apart: dict[str, PerLayer], *, own: bool = False
) -> dict[str, Any]:
    """``given`` without the keywords that have one value per layer, which go to ``apart`` under their names in the stack.

    ``own``: keywords of the stack itself, of which a tuple or a function is meant per layer only where that makes sense.
    """
    rest = {}
    for name, value in given.items():
        per_layer = as_per_layer(value, type_hints(cls)[name])
        if per_layer is None or (own and not isinstance(value, PerLayer) and cls.flag_fields()[name].metadata['each'] is None):
            rest[name] = value
        else:
            apart[prefix + name] = per_layer
    return rest
