"""``python -m tests.laws.support``: write docs/support.json, what each flag works with, as the laws find it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from tests.laws.combination import Combination, contradicts
from tests.laws.groups import CAUSAL, DECODER, GROUPS, SELF, WHOLE, Group
from tests.laws.laws import cached_is_full, can_cache, causal, finite, padding_blind
from x_transformers import InertFlagWarning
from x_transformers.flags.base import FlagError

PATH = Path(__file__).parents[2] / 'docs/support.json'


def case_of(entry: Group, *more: str) -> Combination:
    """The group in a decoder, or else in a model that it fits, with others."""
    return Combination(DECODER if DECODER in entry.kinds else min(entry.kinds), tuple(sorted((entry.name, *more))))


def holds(case: Combination) -> bool:
    """Whether the combination is accepted, and then keeps the laws (``Broken`` is an error, not an answer)."""
    if contradicts(set(case.names)):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', InertFlagWarning)
            case.build()
    except (FlagError, InertFlagWarning):
        return False
    for law in (finite, causal, padding_blind):
        law(case)
    return True


def with_cache(entry: Group) -> bool | None:
    case = case_of(entry)
    if case.kind not in CAUSAL or case.random or case.pooled:
        return None
    cached_is_full(case)
    return can_cache(case.build(dtype=torch.float32))


def with_packing(entry: Group) -> bool | None:
    """tests/layers/test_packing.py holds every accepted flag to it; wrappers lay rows of their own."""
    if not entry.flags or not entry.kinds & WHOLE:
        return None
    case = case_of(entry)
    try:
        case.fresh(stack={'rotary_pos_emb': True} | case.flags | {'attn_flash_pack_seq': True})
    except FlagError:
        return False
    return True


def support(entry: Group) -> dict[str, bool | None]:
    return {
        'cache': with_cache(entry),
        'mems': holds(case_of(entry, 'mems')) if entry.kinds & SELF and entry.name != 'mems' else None,
        'packing': with_packing(entry),
        'pos': holds(case_of(entry, 'pos')) if not entry.name.startswith('pos') else None,
    }


def found() -> dict[str, dict[str, bool | None]]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return {entry.name: support(entry) for entry in GROUPS if entry.flags or entry.wrapper}


def written(table: dict[str, dict[str, bool | None]]) -> str:
    lines = (f'  {json.dumps(name)}: {json.dumps(verdict)}' for name, verdict in table.items())
    return '{\n' + ',\n'.join(lines) + '\n}\n'


if __name__ == '__main__':
    PATH.write_text(written(found()), encoding='utf-8')
    print(f'wrote {PATH}')
