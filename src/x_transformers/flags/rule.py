"""The definition of a rule, and the sentences for broken rules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from x_transformers.flags.base import GROUPS, Flags, Names, Why, as_tuple, shown

FlagsT = TypeVar('FlagsT', bound=Flags)

Name = Callable[[str], str]
"""A flag's name as the user writes it, with its prefix."""

LEAVE_ONE_OUT = 'Leave out one of them.'


@dataclass(frozen=True)
class Rule:
    """Flags that exclude each other.

    ``flags`` are named with their values in the sentence (``only_changed``: those that are not at their default). ``broken``
    sees the flags and the width of the layer. ``why`` and ``way_out`` may hold ``{name}``, the value of a flag or a derived
    value, and ``[name]``, a flag's name as the user writes it. ``example`` breaks the rule. ``inert``: one of the flags only
    does nothing, which is told in a warning.
    """

    flags: tuple[str, ...]
    broken: Callable[[Any, int], bool]
    why: str
    example: Mapping[str, Any] = field(hash=False)
    way_out: str = LEAVE_ONE_OUT
    only_changed: bool = False
    inert: bool = False

    def sentence(self, flags: Any, dim: int, name: Name) -> str:
        named = [flag for flag in self.flags if not self.only_changed or is_on(flags, flag)]
        if self.flags[0] not in named and is_given(flags, self.flags[0]):
            named.insert(0, self.flags[0])
        subject = ' with '.join(f'`{name(flag)}={shown(value_of(flags, flag))}`' for flag in named)
        return f'{subject}: {filled(self.why, flags, dim, name)}. {filled(self.way_out, flags, dim, name)}'


def value_of(flags: Any, name: str) -> Any:
    """A flag's value; in a stack also the value of a part's flag, by its name with prefix."""
    for prefix, part in (('cross_attn_', 'cross_attention'), ('attn_', 'attention'), ('ff_', 'feedforward')):
        if name.startswith(prefix) and hasattr(flags, part) and not hasattr(flags, name):
            varying: Mapping[str, Any] = getattr(flags, 'varying', {})
            return varying[name] if name in varying else getattr(getattr(flags, part), name.removeprefix(prefix))
    return getattr(flags, 'varying', {}).get(name, getattr(flags, name))


def is_on(flags: Any, name: str) -> bool:
    """A flag that was switched on: neither at its default nor empty."""
    for prefix, part in (('cross_attn_', 'cross_attention'), ('attn_', 'attention'), ('ff_', 'feedforward')):
        if name.startswith(prefix) and hasattr(flags, part) and not hasattr(flags, name):
            return name in getattr(flags, 'varying', {}) or is_on(getattr(flags, part), name.removeprefix(prefix))
    value = getattr(flags, name)
    return flags.is_changed(name) and value is not None and value is not False and value != 0


def is_given(flags: Any, name: str) -> bool:
    """A flag that is not at its default; 0 is a value where the default is None."""
    value = getattr(flags, name, None)
    return value is not None and value is not False and flags.is_changed(name)


def how_many(flags: Any, names: Iterable[str]) -> int:
    return sum(is_on(flags, name) for name in names)


def filled(text: str, flags: Any, dim: int, name: Name) -> str:
    text = re.sub(r'\[(\w+)\]', lambda found: f'`{name(found[1])}`', text)
    return re.sub(r'\{(\w+)\}', lambda found: str(dim) if found[1] == 'dim' else str(value_of(flags, found[1])), text)


def broken_rules(rules: Iterable[Rule], flags: Any, dim: int, name: Name, *, inert: bool = False) -> list[str]:
    """A sentence for each broken rule of a table. A number out of its range is not looked at any further.

    ``inert``: the rules about flags that do nothing, which are left out otherwise.
    """
    senseless = out_of_range(flags, name)
    applicable = [rule for rule in rules if rule.inert == inert and not any(flag in senseless for flag in rule.flags)]
    return [rule.sentence(flags, dim, name) for rule in applicable if rule.broken(flags, dim)]


# ---------------------------------------------------------------- rules that the fields themselves make


@cache
def _rules_of(cls: Any) -> tuple[Rule, ...]:
    rules = [rule for name in cls.flag_fields() for rule in said_by(cls, name)]
    return (*rules, *(only_one(cls, group) for group in GROUPS if len(cls.one_of(group)) > 1))


# not the cached function itself, for which type checkers want an argument with a hash and take a class for its instances
def rules_of(cls: Any) -> tuple[Rule, ...]:
    """The rules that the fields of a class say, each beside the flag that it is about; and one for each group of flags."""
    return _rules_of(cls)


def alike_of(cls: Any) -> tuple[Rule, ...]:
    """The same, asked of a stack whose layers differ: what layers share or hand on needs the same everywhere."""
    return tuple(rule for its_field in cls.flag_fields().values() for rule in its_field.metadata['alike'])


def reasons_in(cls: type[Flags], situation: str) -> dict[str, tuple[str, type | None]]:
    """(the reason, the type of values that are allowed) for each flag that is refused in this one of ``SITUATIONS``."""
    reasons = {name: its_field.metadata['refused'].get(situation) for name, its_field in cls.flag_fields().items()}
    return {name: (why, None) if isinstance(why, str) else why for name, why in reasons.items() if why is not None}


def refused_in(cls: type[Flags], situation: str) -> tuple[Rule, ...]:
    """A rule for each flag that is refused in this one of ``SITUATIONS``."""
    return tuple(unfit(cls, name, why) for name, (why, _) in reasons_in(cls, situation).items())


def unfit(cls: type[Flags], name: str, why: str) -> Rule:
    return Rule((name,), lambda flags, dim: is_on(flags, name), why, cls.switched_on(name), 'Leave it out.')


def said_by(cls: type[Flags], name: str) -> Iterable[Rule]:
    """A field that is shared by several classes may name flags that this one does not have: such rules are left out."""
    metadata = cls.flag_fields()[name].metadata
    for word, inert in (('excludes', False), ('idle_with', True)):
        rules = (exclusion(cls, name, others, why, inert) for others, why in metadata[word].items())
        yield from (rule for rule in rules if cls.switched_on(rule.flags[1]))
    yield from (need(cls, name, needed, why) for needed, why in metadata['needs'].items())
    yield from metadata['rules']


def with_way_out(why: Why, way_out: str) -> tuple[str, str]:
    return (why, way_out) if isinstance(why, str) else why


def exclusion(cls: type[Flags], name: str, others: Names, why: Why, inert: bool) -> Rule:
    members = (member for other in as_tuple(others) for member in (cls.one_of(other) or cls.having(other) or (other,)))
    names = tuple(member for member in members if member != name)
    why, way_out = with_way_out(why, LEAVE_ONE_OUT)
    return Rule(
        (name, *names),
        lambda flags, dim: is_given(flags, name) and how_many(flags, names) > 0,
        why,
        cls.switched_on(names[0]) | cls.switched_on(name),
        way_out,
        only_changed=True,
        inert=inert,
    )


def need(cls: type[Flags], name: str, needed: str, why: Why) -> Rule:
    """A switch is told with its value; a number that is missing has none to tell."""
    is_switch = isinstance(cls.default(needed), bool)
    why, way_out = with_way_out(why, f'Set [{needed}], or leave out [{name}].' if is_switch else f'Give [{needed}].')
    return Rule(
        (name, needed) if is_switch else (name,),
        lambda flags, dim: is_given(flags, name) and (getattr(flags, needed) is None or getattr(flags, needed) is False),
        why,
        cls.switched_on(name) | {needed: cls.default(needed)},
        way_out,
    )


def only_one(cls: type[Flags], group: str) -> Rule:
    names = cls.one_of(group)
    example = cls.switched_on(names[1]) | cls.switched_on(names[0])
    return Rule(names, lambda flags, dim: how_many(flags, names) > 1, GROUPS[group], example, 'Keep one.', only_changed=True)


def out_of_range(flags: Flags, name: Name) -> dict[str, str]:
    """A sentence for each flag whose number is outside its range."""
    sentences = {}
    for flag, its_field in flags.flag_fields().items():
        low, high, above, below = (its_field.metadata[bound] for bound in ('low', 'high', 'above', 'below'))
        setting, among = getattr(flags, flag), its_field.metadata['among']
        if among is not None and setting not in among:
            sentences[flag] = f'`{name(flag)}={shown(setting)}`: it must be {" or ".join(map(repr, among))}.'
        values = setting if isinstance(setting, tuple) else (setting,)
        for value in values:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            wanted = [
                f'{words} {bound}'
                for words, bound, fine in (
                    ('at least', low, low is None or value >= low),
                    ('at most', high, high is None or value <= high),
                    ('greater than', above, above is None or value > above),
                    ('less than', below, below is None or value < below),
                )
                if not fine
            ]
            if wanted:
                sentences[flag] = f'`{name(flag)}={shown(setting)}`: it must be {" and ".join(wanted)}.'
                break
    return sentences


def has_effect(flags: Any, parent: str) -> bool:
    """Whether sub-options of a flag are asked: it was switched on, or is on by default."""
    return getattr(flags, parent) is True or is_on(flags, parent)


def effective(flags: FlagsT) -> FlagsT:
    """The flags, with every sub-option whose parent is off at its default: what does nothing must build nothing either."""
    while True:
        idle = {
            name: flags.default(name)
            for name, its_field in flags.flag_fields().items()
            if (parents := as_tuple(its_field.metadata['parent']))
            and flags.is_changed(name)
            and not any(is_on(flags, parent) for parent in parents)
        }
        if not idle:
            return flags
        flags = dataclasses.replace(flags, **idle)  # type: ignore[type-var]


def orphans(flags: Flags, name: Name, skip: Callable[[str, tuple[str, ...]], bool] = lambda flag, parents: False) -> list[str]:
    """A sentence for each sub-option that was changed although its parent is off, so that it does nothing."""
    sentences = []
    for flag, its_field in flags.flag_fields().items():
        parents = as_tuple(its_field.metadata['parent'])
        if (
            not parents
            or not flags.is_changed(flag)
            or any(has_effect(flags, parent) for parent in parents)
            or skip(flag, parents)
        ):
            continue
        wanted = ' or '.join(f'`{name(parent)}`' for parent in parents)
        sentences.append(
            f'`{name(flag)}={shown(getattr(flags, flag))}` does nothing without {wanted}. Set that, or leave this out.'
        )
    return sentences
