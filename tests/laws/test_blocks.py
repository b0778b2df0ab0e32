"""The laws where attention runs in blocks, which otherwise are longer than the sequences of the laws."""

from __future__ import annotations

import pytest

from tests.laws.combination import Combination, draw, rotated
from tests.laws.laws import LAWS
from tests.laws.test_laws import build_or_refuse
from x_transformers.attention.kernels import block_steps, sdpa

# what runs in blocks by itself, and what changes masks, keys or positions there
NAMES = {
    'alibi', 'alibi_heads', 'attn_bias_heads', 'dynamic', 'forgetting', 'forgetting_row', 'post_talking',
    'pre_scale_post_talking', 'pre_talking', 'sigmoid', 'sink', 'softclamp', 'sparse_topk', 't5', 'window',
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 3)
    monkeypatch.setattr(sdpa, 'writes_more_than_it_reads', lambda call: call.geometry.queries > 1)


@pytest.mark.parametrize('case', [case for case in rotated() if NAMES & set(case.names)], ids=str)
def test_every_flag_alone(case: Combination) -> None:
    case.build()
    for law in LAWS:
        law(case)


# a flag that does nothing beside the others is told, and does no harm
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('case', [case for case in draw(400, 1117) if NAMES & set(case.names)][:40], ids=str)
def test_random_combinations(case: Combination) -> None:
    if build_or_refuse(case):
        for law in LAWS:
            law(case)
