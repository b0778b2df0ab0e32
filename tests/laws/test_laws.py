"""Every flag alone and random combinations of up to six, under every law.

``LAWS_COUNT``: how many random combinations, of the seed ``LAWS_SEED``; ``LAWS_EVERYWHERE``: every flag in every kind of model.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.laws.combination import Combination, draw, rotated, singles
from tests.laws.laws import (
    LAWS,
    causal,
    continuation_compiles,
    continuations_are_full,
    left_padding_blind,
    padding_blind,
    segments_are_whole,
)
from x_transformers.flags.base import FlagError

SEED = int(os.environ.get('LAWS_SEED', '2161'))
COUNT = int(os.environ.get('LAWS_COUNT', '200'))
ALONE = singles() if os.environ.get('LAWS_EVERYWHERE') else rotated()


def build_or_refuse(case: Combination) -> bool:
    """True if the combination is accepted; a refusal must be a ``FlagError`` from a constructor."""
    try:
        case.build()
    except FlagError as refusal:
        if len(str(refusal)) <= 20:
            pytest.fail(f'{refusal}: a refusal must say more than that')
        return False
    return True


@pytest.mark.parametrize('case', ALONE, ids=str)
def test_every_flag_alone(case: Combination) -> None:
    if not build_or_refuse(case):
        pytest.fail(f'{case} is refused, though it is one idea with all that it needs')
    for law in LAWS:
        law(case)


# a flag that does nothing beside the others is told, and does no harm
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('case', draw(COUNT, SEED), ids=str)
def test_random_combinations(case: Combination) -> None:
    if not build_or_refuse(case):
        return
    for law in LAWS:
        law(case)


def test_a_prefix_decoder_shifts_to_the_right_only() -> None:
    causal(Combination('prefix', ('shift',)))


@pytest.mark.parametrize('name', ['reinject', 'reinject_gate', 'in_attn_cond', 'in_attn_cond_per_token'])
def test_memories_hold_what_was_injected(name: str) -> None:
    segments_are_whole(Combination('decoder', (name,)))


def test_left_padding_does_not_move_tokens_away_from_the_positions_of_a_context() -> None:
    left_padding_blind(Combination('cross', ('context_pos',)))


@pytest.mark.parametrize(
    'names', [('exclusive', 'hybrid_mix'), ('differential', 'exclusive'), ('glu', 'ngpt_glu', 'orthog_both')], ids=str
)
def test_of_a_token_that_sees_itself_alone_nothing_is_left(names: tuple[str, ...]) -> None:
    padding_blind(Combination('decoder', names))


@pytest.mark.parametrize('kind', ['decoder', 'cross', 'prefix'])
def test_left_padding_does_not_move_queries_with_gains_behind_the_turn(kind: str) -> None:
    left_padding_blind(Combination(kind, ('ngpt', 'rotary')))


@pytest.mark.parametrize('name', ['attn_mask', 'attn_mask_whole', 'attn_mask_rows', 'attn_mask_heads'])
def test_in_memory_of_fixed_shape_a_mask_of_pairs_leaves_memories_open(name: str) -> None:
    continuations_are_full(Combination('decoder', (name, 'mems')))


SAMPLE = ('decoder+rotary', 'cross+alibi', 'decoder+mla', 'decoder+shift', 'prefix+t5')
EVERY = [str(case) for case in rotated() if str(case) not in SAMPLE]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', [*SAMPLE, *(pytest.param(text, marks=pytest.mark.deep) for text in EVERY)])
def test_one_graph_reads_all_tokens_behind_a_cache(text: str) -> None:
    torch.compiler.reset()
    continuation_compiles(Combination.parse(text))
