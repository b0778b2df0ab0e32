"""Command-line options, generated from the flags: one option per keyword, grouped by constructor.

Keywords that only code can give (modules, functions) have no option; dictionaries are given in a TOML file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union, get_origin

import tyro

from x_transformers.flags.base import Flags, as_tuple, default_of, kinds_of, type_hints
from x_transformers.flags.parts import PARTS, keyword_names
from x_transformers.flags.presets import help_text
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.training.build import QUICKSTART, UNFIT

PLAIN = (bool, int, float, str, types.NoneType)
GROUPS = {
    'model': 'The model around the stack.',
    'stack': 'The stack of layers.',
    'attention': 'Self attention.',
    'cross_attention': 'Cross attention; what is not given is as for self attention.',
    'feedforward': 'Feed-forward.',
}
PART_OF_GROUP = {'attention': 'attn_', 'cross_attention': 'cross_attn_', 'feedforward': 'ff_'}

# the command line sets these itself: a decoder over bytes
SET_HERE = {'causal', 'num_tokens', 'attn_layers'}


@dataclasses.dataclass(frozen=True)
class Keyword:
    """One keyword of TransformerWrapper or Decoder, flat: its flags class, its field, its full name."""

    name: str
    flags: type[Flags]
    field_name: str

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.flags.flag_fields()[self.field_name].metadata

    @property
    def default(self) -> Any:
        """The constructor's default; None for a required one."""
        value = default_of(self.flags.flag_fields()[self.field_name])
        return None if value is dataclasses.MISSING else value

    @property
    def kinds(self) -> tuple[Any, ...]:
        return kinds_of(type_hints(self.flags)[self.field_name])

    @property
    def plain_kinds(self) -> tuple[Any, ...]:
        """The kinds of value that can be typed; of what may differ between layers, several numbers too, one for each layer."""
        plain = tuple(kind for kind in self.kinds if kind in PLAIN or get_origin(kind) is tuple)
        if not self.per_layer or takes_tuple(plain):
            return plain
        several: dict[Any, Any] = {int: tuple[int, ...], float: tuple[float, ...]}
        return plain + tuple(several[kind] for kind in plain if kind in several)

    @property
    def per_layer(self) -> bool:
        """Whether the keyword may have a value for each layer."""
        return self.flags not in (StackFlags, WrapperFlags) or self.metadata['each'] is not None

    @property
    def has_option(self) -> bool:
        return any(kind is not types.NoneType for kind in self.plain_kinds)

    def sentence(self) -> str:
        paper = ', '.join(as_tuple(self.metadata['paper']))
        return f'{self.metadata["says"]} ({paper})' if paper else str(self.metadata['says'])


def takes_tuple(kinds: tuple[Any, ...]) -> bool:
    return any(get_origin(kind) is tuple for kind in kinds)


@cache
def group_keywords(group: str) -> dict[str, Keyword]:
    """The keywords of one group, by the name they have in a flat call."""
    if group in PART_OF_GROUP:
        part = PART_OF_GROUP[group]
        keywords = [Keyword(name, PARTS[part], name.removeprefix(part)) for name in keyword_names(part)]
    else:
        flags = WrapperFlags if group == 'model' else StackFlags
        keywords = [Keyword(name, flags, name) for name in flags.flag_fields()]
    return {keyword.name: keyword for keyword in keywords if keyword.name not in SET_HERE}


@cache
def all_keywords() -> dict[str, Keyword]:
    return {name: keyword for group in GROUPS for name, keyword in group_keywords(group).items()}


@cache
def group_class(group: str) -> type:
    """A frozen dataclass with one field per option of a group; its defaults are those of the command line."""
    fields: list[tuple[str, Any, Any]] = []
    for name, keyword in group_keywords(group).items():
        if not keyword.has_option:
            continue
        inherits = group == 'cross_attention'
        default = None if inherits else QUICKSTART.get(name, keyword.default)
        kinds = keyword.plain_kinds
        if default is None and types.NoneType not in kinds:
            kinds = (*kinds, types.NoneType)
        kind = Annotated[Union[kinds], tyro.conf.arg(help=keyword.sentence())]  # type: ignore[valid-type]  # noqa: UP007
        fields.append((name, kind, dataclasses.field(default=default)))
    options = dataclasses.make_dataclass(f'{group.title().replace("_", "")}Options', fields, frozen=True, kw_only=True)
    options.__doc__ = GROUPS[group]
    return options


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Every flag of the model that can be typed, in the groups of the constructors."""

    model: Any
    stack: Any
    attention: Any
    cross_attention: Any
    feedforward: Any

    def given(self) -> dict[str, Any]:
        """Flat keywords for the constructors: those that differ from their defaults."""
        flat: dict[str, Any] = {}
        for group in GROUPS:
            for field in dataclasses.fields(getattr(self, group)):
                value = getattr(getattr(self, group), field.name)
                keyword = group_keywords(group)[field.name]
                usual = None if group == 'cross_attention' else keyword.default
                if value != usual or type(value) is not type(usual):
                    flat[field.name] = tuple(value) if isinstance(value, (list, tuple)) else value
        return flat


def preset_option() -> Any:
    """The type of a field that takes the name of a preset."""
    return Annotated[str | None, tyro.conf.arg(help=f'Flags by one name; {help_text()}. Typed flags override it.')]


def model_fields() -> list[tuple[str, Any, Any]]:
    """The groups as fields of a command's dataclass; their options carry no prefix but their own."""
    return [(group, group_class(group), dataclasses.field(default_factory=group_class(group))) for group in GROUPS]


def is_refused(name: str) -> bool:
    """Whether every command refuses this flag: their model is a decoder over tokens, which is given nothing beside them."""
    if name in UNFIT or name in group_keywords('cross_attention'):
        return True
    keyword = all_keywords()[name]
    parents = as_tuple(keyword.metadata['parent'])
    return bool(parents) and all(is_refused(name.removesuffix(keyword.field_name) + parent) for parent in parents)
