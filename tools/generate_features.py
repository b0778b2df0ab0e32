"""Write docs/features.md: every flag with its default, its sentence and its paper, and every rule between flags."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from x_transformers.attention.attend import ORDER
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels.base import CallFacts, Needs
from x_transformers.attention.kernels.choose import KERNELS
from x_transformers.attention.refusals import not_with_dropout
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import REQUIRED, Flags, as_tuple, default_of, shown
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.other_inputs import ContinuousFlags, MultiInputFlags, XValFlags
from x_transformers.flags.parts import SET_BY_STACK
from x_transformers.flags.rule import Rule, rules_of
from x_transformers.flags.rules import rules_of_model
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.stack_rules import STACK_RULES
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper import WrapperFlags

# the laws are beside the tools, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.laws.groups import GROUPS, Group

ROOT = Path(__file__).parent.parent
PATH, SUPPORT, ATLAS = (ROOT / 'docs' / name for name in ('features.md', 'support.json', 'atlas/atlas.toml'))
# those whose keywords the laws draw
LAWFUL = (StackFlags, AttentionFlags, FeedForwardFlags, WrapperFlags)
# those whose pages are divided by family
DIVIDED = (StackFlags, AttentionFlags, WrapperFlags)
# what may stand in front of such a flag in a stack or a model
PREFIXES: dict[type[Flags], tuple[str, ...]] = {
    StackFlags: ('',),
    AttentionFlags: ('attn_', ''),
    FeedForwardFlags: ('ff_',),
    WrapperFlags: ('',),
}

SECTIONS: tuple[tuple[str, str, type[Flags], Sequence[Rule]], ...] = (
    (
        'The stack',
        'Keywords of `AttentionLayers`, `Encoder`, `Decoder`, `PrefixDecoder` and `CrossAttender`.',
        StackFlags,
        STACK_RULES,
    ),
    (
        'Attention',
        'Keywords of `Attention`. In a stack they have `attn_` in front; they hold for cross attention too, unless the same '
        'keyword with `cross_attn_` says otherwise.',
        AttentionFlags,
        rules_of(AttentionFlags),
    ),
    (
        'Feed-forward',
        'Keywords of `FeedForward`. In a stack they have `ff_` in front.',
        FeedForwardFlags,
        rules_of(FeedForwardFlags),
    ),
    ('Models of tokens', 'Keywords of `TransformerWrapper`.', WrapperFlags, rules_of(WrapperFlags)),
    ('Models of vectors', 'Keywords of `ContinuousTransformerWrapper`.', ContinuousFlags, rules_of_model(ContinuousFlags)),
    (
        'Models of several tokens',
        'Keywords of `MultiInputTransformerWrapper`.',
        MultiInputFlags,
        rules_of_model(MultiInputFlags),
    ),
    ('Models of numbers', 'Keywords of `XValTransformerWrapper`.', XValFlags, rules_of_model(XValFlags)),
    ('Models of images', 'Keywords of `ViTransformerWrapper`.', VisionFlags, rules_of(VisionFlags)),
)


def parent_of(cls: type[Flags], name: str) -> str | None:
    """The flag of the same class that a sub-option stands under."""
    return next((p for p in as_tuple(cls.flag_fields()[name].metadata['parent']) if p in cls.flag_fields()), None)


def family_of(cls: type[Flags], name: str) -> str | None:
    if cls not in DIVIDED:
        return None
    parent = parent_of(cls, name)
    family: str | None = cls.flag_fields()[name].metadata['family']
    return family if parent is None else family_of(cls, parent)


def families(cls: type[Flags]) -> dict[str | None, list[str]]:
    """The flags of each family; under None where the class is not divided."""
    if cls not in DIVIDED:
        return {None: list(cls.flag_fields())}
    found: dict[str | None, list[str]] = {}
    for name in cls.flag_fields():
        found.setdefault(family_of(cls, name), []).append(name)
    return found


def paper_link(paper: str) -> str:
    arxiv = re.fullmatch(r'https://arxiv\.org/abs/(\S+)', paper)
    label = arxiv[1] if arxiv else re.sub(r'^www\.', '', paper.split('/')[2])
    return f'[{label}]({paper})'


@cache
def smallest_groups() -> dict[str, Group]:
    """Of each keyword as it is written in a stack or a model, the law group with the fewest flags."""
    found: dict[str, Group] = {}
    for entry in sorted(GROUPS, key=lambda entry: len(entry.flags) + len(entry.wrapper)):
        for keyword in (*entry.flags, *entry.wrapper):
            found.setdefault(keyword, entry)
    return found


def group_of(cls: type[Flags], name: str) -> Group | None:
    """Keywords of a stack, of a part of it with its prefix or without, and of the model of tokens; the others have no laws."""
    for prefix in PREFIXES.get(cls, ()):
        entry = smallest_groups().get(prefix + name)
        if entry is not None and (prefix + name in entry.wrapper) == (cls is WrapperFlags):
            return entry
    return None


def without(cls: type[Flags], name: str, entry: Group) -> str:
    """What a flag does not work with, as the laws found it, and the fused kernels that do not carry it."""
    verdict = json.loads(SUPPORT.read_text(encoding='utf-8'))[entry.name]
    missing = [f'`{part}`' if part in ('pos', 'mems') else part for part, works in verdict.items() if works is False]
    if cls is AttentionFlags:
        given = {flag.removeprefix('attn_'): value for flag, value in entry.flags.items()}
        known = {name: value for name, value in given.items() if name in AttentionFlags.flag_fields()}
        flags = AttentionFlags(**known)
        needs = Needs.of(rule for rule in ORDER if rule.is_on(flags))
        best = CallFacts(
            'cuda',
            torch.bfloat16,
            True,
            'attn_dropout' in entry.flags,
            8,
            8,
            64,
            64,
            ScoreShape(1024, 1024),
            plain_causal=True,
            causal=True,
        )
        missing += [
            kernel.name for kernel in KERNELS if kernel.name in ('sdpa', 'flex', 'blocks') and kernel.refusals(needs, best)
        ]
    return ', '.join(missing)


def example(entry: Group) -> str:
    """The keywords of the laws, as they are written."""
    return ', '.join(f'{name}={written(value)}' for name, value in {**entry.flags, **entry.wrapper}.items())


def written(value: object) -> str:
    return '...' if callable(value) else repr(value)


def papers_of(cls: type[Flags], name: str) -> tuple[str, ...]:
    """Where the idea comes from: of a sub-option without a paper of its own, what it belongs to."""
    fields = cls.flag_fields()
    metadata = fields[name].metadata
    own: tuple[str, ...] = as_tuple(metadata['paper'])
    above = [parent for parent in as_tuple(metadata['parent']) if parent in fields]
    return own or tuple(dict.fromkeys(paper for parent in above for paper in papers_of(cls, parent)))


def row(cls: type[Flags], name: str) -> str:
    field = cls.flag_fields()[name]
    default, entry = default_of(field), group_of(cls, name)
    cells: tuple[str, ...] = (
        f'`{name}`',
        'required' if default is REQUIRED else f'`{shown(default)}`',
        field.metadata['says'] + measured_link(cls, name),
        ' or '.join(f'`{parent}`' for parent in as_tuple(field.metadata['parent'])),
        ', '.join(map(paper_link, papers_of(cls, name))) or 'no paper',
    )
    if cls in LAWFUL:
        cells += ('', '') if entry is None else (without(cls, name, entry), f'`{example(entry)}`')
    return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


@cache
def measured() -> dict[str, str]:
    """Of each flag that the atlas of ideas has measured, as it is written in a stack or a model, the idea."""
    plan = tomllib.loads(ATLAS.read_text(encoding='utf-8'))
    lines = map(json.loads, ATLAS.with_name('results.jsonl').read_text(encoding='utf-8').splitlines())
    runs = Counter((line['task'], line['idea']) for line in lines if 'seed' in line)
    ran = {idea for (_, idea), count in runs.items() if count >= plan['seeds']}
    found: dict[str, str] = {}
    for idea, flags in sorted(plan['ideas'].items(), key=lambda item: len(item[1])):
        for place, (name, value) in enumerate(flags.items() if idea in ran else ()):
            # behind the first, sizes that go with it say nothing of themselves
            if place == 0 or value is True:
                found.setdefault(name, idea)
    return found


def idea_of(cls: type[Flags], name: str) -> str | None:
    """The idea of the atlas that a flag belongs to."""
    return next((idea for prefix in PREFIXES.get(cls, ()) if (idea := measured().get(prefix + name)) is not None), None)


def measured_link(cls: type[Flags], name: str) -> str:
    idea = idea_of(cls, name)
    return '' if idea is None else f' ([measured](atlas.md#{idea}))'


def rule_line(rule: Rule) -> str:
    names = ', '.join(f'`{name}`' for name in rule.flags)
    # behind a colon stands what an error finds wrong with the value at hand
    text = re.sub(r': \{\w+_complaints\}$', '', rule.why) + f'. {rule.way_out}'
    return f'- {names}: ' + re.sub(r'\[(\w+)\]|\{(\w+)\}', lambda found: f'`{found[1] or found[2]}`', text)


def listed(names: Iterable[str]) -> str:
    return ', '.join(f'`{name}`' for name in names)


def generated() -> str:
    """The text of the file."""
    lines = [
        '# Features',
        '',
        'This page lists every keyword. `make docs` generates it from the flags. A sub-option has no effect without its parent',
        'flag (column *belongs to*); one warning lists all flags without effect. The constructor refuses the combinations',
        'listed below each table. If one of the flags merely has no effect, it warns instead. The error names all broken rules',
        'at once. *measured* links to the results of an idea in the [atlas](atlas.md). *no paper* means that the flag is a',
        'size, a choice, or was not published as a paper.',
        '',
        '*Not with* names what a flag does not work with: a cache, `mems`, packed sequences, custom positions `pos`, as found',
        'by `python -m tests.laws.support`, and the fused kernels that do not support it ([kernels.md](kernels.md) has the',
        'reasons). An empty cell means that all of them work. The example is the setting that the property tests build, in',
        'addition to `dim` and `depth`. A flag without an example is part of every model that they build, or has its own test.',
    ]
    for title, about, cls, rules in SECTIONS:
        lines += ['', f'## {title}', '', about, '']
        columns = (
            'flag',
            'default',
            'what it does',
            'belongs to',
            'paper',
            *(('not with', 'example') if cls in LAWFUL else ()),
        )
        head = ['| ' + ' | '.join(columns) + ' |', '| ' + ' | '.join('---' for _ in columns) + ' |']
        for family, names in families(cls).items():
            lines += [] if family is None else [f'### {title}: {family}', '']
            lines += [*head, *(row(cls, name) for name in names), '']
        if cls is AttentionFlags:
            lines += [f'Set by the stack, so without a prefix there: {listed(SET_BY_STACK)}.']
            lines += [f'Not taken over by cross attention: {listed(AttentionFlags.self_only())}.', '']
        lines += ['Combinations that are refused or have no effect:', '', *map(rule_line, rules)]
        if cls is AttentionFlags:
            lines += [
                f'- `flash`, `{name}`: {why}, which no fused kernel does. Leave out one of them.'
                for name, why in dict.fromkeys((rule.name, rule.unfused) for rule in ORDER if rule.unfused is not None)
            ]
            apart = dict.fromkeys(rule.name for rule in ORDER if rule.unfused is None and not_with_dropout(rule))
            lines.append(f'- `flash`, `dropout` and one of {listed(apart)}: no fused kernel has both.')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
