"""The flag pages of the site: one per family of flags, with a section of its own for every flag, under its full name.

The site makes them while it is built (``tools/site_hooks.py``), so they are never stale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from generate_atlas import short
from generate_features import (
    LAWFUL,
    SECTIONS,
    example,
    families,
    family_of,
    group_of,
    idea_of,
    paper_link,
    papers_of,
    parent_of,
    without,
)
from kept import THE_ATLAS

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import REQUIRED, Flags, as_tuple, default_of, kinds_of, one_kind, shown, type_hints
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.parts import SET_BY_STACK
from x_transformers.flags.rule import Rule

PREFIX: dict[type[Flags], str] = {AttentionFlags: 'attn_', FeedForwardFlags: 'ff_'}


def page_name(title: str, family: str | None = None) -> str:
    words = title.lower().removeprefix('the ') + ('' if family is None else f' {family}')
    return words.replace(' ', '_').replace('-', '_') + '.md'


def full_name(cls: type[Flags], name: str) -> str:
    """As the user writes it in a stack or a model."""
    if cls is AttentionFlags and name in SET_BY_STACK:
        return name
    return PREFIX.get(cls, '') + name


def nested(cls: type[Flags], names: list[str]) -> Iterator[tuple[str, int]]:
    """Each flag with its depth, directly behind the flag that it belongs to."""

    def below(parent: str | None, depth: int) -> Iterator[tuple[str, int]]:
        for name in names:
            if parent_of(cls, name) == parent:
                yield name, depth
                yield from below(name, depth + 1)

    return below(None, 0)


def values(cls: type[Flags], name: str) -> str:
    """The kinds of value that a flag takes, and their range."""
    field = cls.flag_fields()[name]
    kinds = ' or '.join(dict.fromkeys(one_kind(kind)[0] for kind in kinds_of(type_hints(cls)[name])))
    words = (('low', 'at least'), ('above', 'greater than'), ('high', 'at most'))
    bounds = [f'{text} {field.metadata[bound]:g}' for bound, text in words if field.metadata[bound] is not None]
    return f'{kinds}, {" and ".join(bounds)}' if bounds else kinds


def excluded(cls: type[Flags], rules: Sequence[Rule], name: str) -> list[str]:
    """A sentence for each rule that the flag is part of, with all names as the user writes them."""

    def written(flag: str) -> str:
        return f'`{full_name(cls, flag) if flag in cls.flag_fields() else flag}`'

    sentences = []
    for rule in rules:
        if name in rule.flags:
            others = ', '.join(written(flag) for flag in rule.flags if flag != name)
            text = re.sub(r'\[(\w+)\]|\{(\w+)\}', lambda found: written(found[1] or found[2]), f'{rule.why}. {rule.way_out}')
            sentences.append(f'with {others}: {text}' if others else text)
    return sentences


@cache
def verdicts() -> dict[str, list[str]]:
    """Of each idea of the atlas, what it did on each task that it has run on."""
    outcomes = THE_ATLAS.as_shown().outcomes({})
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.idea, []).append(f'{outcome.task}: {short(outcome)}')
    return found


def measured_facts(cls: type[Flags], name: str) -> list[str]:
    idea = idea_of(cls, name)
    told = verdicts().get(idea, []) if idea is not None else []
    return [f'**Measured** {"; ".join(told)} ([what that means](../atlas.md#{idea}))'] if told else []


def link_to(cls: type[Flags], name: str, other: str) -> str:
    """A link to a flag of the same class, from the page of another one."""
    full = full_name(cls, name)
    if name not in cls.flag_fields():
        return f'`{full}`'
    family = family_of(cls, name)
    page = '' if family == family_of(cls, other) else page_name(title_of(cls), family)
    return f'[`{full}`]({page}#{full})'


def title_of(cls: type[Flags]) -> str:
    return next(title for title, _, section_class, _ in SECTIONS if section_class is cls)


def section(cls: type[Flags], rules: Sequence[Rule], name: str, depth: int) -> list[str]:
    field = cls.flag_fields()[name]
    default, entry = default_of(field), group_of(cls, name)
    papers = ', '.join(map(paper_link, papers_of(cls, name)))
    facts = [
        f'**Takes** {values(cls, name)}. ' + ('Required.' if default is REQUIRED else f'Default `{shown(default)}`.'),
        f'**Paper** {papers or "no paper"}',
    ]
    if field.metadata['parent']:
        facts.append(
            '**Belongs to** ' + ' or '.join(link_to(cls, parent, name) for parent in as_tuple(field.metadata['parent']))
        )
    if cls in LAWFUL and entry is not None:
        missing = without(cls, name, entry)
        facts.append(
            f'**Does not work with** {missing}'
            if missing
            else '**Works with** caches, memories, packed sequences and every kernel'
        )
    if (cls is AttentionFlags and name not in SET_BY_STACK) or cls is FeedForwardFlags or field.metadata['each']:
        facts.append('**Per layer** a tuple or a function of the index gives each layer its own: [per layer](../per_layer.md)')
    facts += measured_facts(cls, name)
    facts += [f'**Excluded** {line}' for line in excluded(cls, rules, name)]
    lines = [
        '',
        f'{"#" * (2 + min(depth, 3))} `{full_name(cls, name)}`',
        '',
        field.metadata['says'],
        *([] if field.metadata.get('formula') is None else ['', f'`{field.metadata["formula"]}`']),
        '',
        *(f'- {fact}' for fact in facts),
    ]
    if entry is not None:
        constructor = 'TransformerWrapper(...' if entry.wrapper else 'Decoder(dim=512, depth=6'
        lines += ['', '```python', f'{constructor}, {example(entry)})', '```']
    return lines


def generated() -> dict[str, str]:
    """The text of each page, by its file's name."""
    pages = {}
    for title, about, cls, rules in SECTIONS:
        for family, names in families(cls).items():
            heading = f'{title}: every flag' if family is None else f'{title}: {family}'
            lines = [f'# {heading}', '', about, '', 'Generated by `make docs` from the flags themselves.']
            for name, depth in nested(cls, names):
                lines += section(cls, rules, name, depth)
            pages[page_name(title, family)] = '\n'.join(lines) + '\n'
    return pages
