"""The parts of a stack, and the prefix of each part's keywords."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import Flags, UnknownFlag, unknown_flags
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.wrapper import of_token_models

PARTS: dict[str, type[Flags]] = {'attn_': AttentionFlags, 'cross_attn_': AttentionFlags, 'ff_': FeedForwardFlags}

# what the stack itself tells its attention layers, so it has no name with a prefix
SET_BY_STACK = AttentionFlags.having('set_by_stack')
CROSS_SET_BY_STACK = AttentionFlags.having('set_for_cross')


def split_parts(
    given: Mapping[str, Any], own_names: Collection[str], *, where: str, prefix: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the stack's own keywords, the parts' keywords by prefix); raises UnknownFlag for all others."""
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    unknown, reserved = [], []
    for name, value in given.items():
        part = first_prefix(name)
        if name in own_names:
            own[name] = value
        elif part is not None and name in keyword_names(part):
            parts[part][name.removeprefix(part)] = value
        elif part is not None and name.removeprefix(part) in SET_BY_STACK:
            reserved.append(
                f'{where}: unrecognized kwargs: `{prefix}{name}` is set by the stack; '
                f'use `{prefix}{name.removeprefix(part)}` without `{part}`.'
            )
        else:
            unknown.append(name)
    if reserved or unknown:
        known = [*own_names, *(name for part in PARTS for name in keyword_names(part))]
        spelt = [prefix + name for name in known]
        near = unknown_flags([prefix + name for name in unknown], where=where, known=spelt, elsewhere=of_token_models())
        raise UnknownFlag(*reserved, *near.sentences)
    return own, parts


def cross_inherits(name: str, given: Mapping[str, Any]) -> bool:
    """Does cross attention take this attn_ flag over? Not what needs the order of one sequence, and not the other way to choose
    the key heads than the one ``given`` with cross_attn_."""
    other_way = {'kv_heads': 'one_kv_head', 'one_kv_head': 'kv_heads'}
    return not AttentionFlags.flag_fields()[name].metadata['self_only'] and not given.get(other_way.get(name, ''))


def first_prefix(name: str) -> str | None:
    return next((part for part in PARTS if name.startswith(part)), None)


def keyword_names(part: str) -> list[str]:
    """The keywords of one part, with its prefix: those that the stack does not set itself."""
    return [part + name for name in PARTS[part].flag_fields() if name not in reserved(part)]


def reserved(part: str) -> tuple[str, ...]:
    """What the stack itself sets on this part."""
    return {'attn_': SET_BY_STACK, 'cross_attn_': CROSS_SET_BY_STACK}.get(part, ())
