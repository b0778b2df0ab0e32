from __future__ import annotations

import itertools

import pytest
import torch

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask, PackedSequences, Placed

from .formula import may_look

B, H = 2, 3


def by_formula(geometry: ScoreShape, **mask) -> torch.Tensor:
    shape = (B, H, geometry.queries, geometry.keys)
    cells = itertools.product(*map(range, shape))
    return torch.tensor([may_look(*cell, geometry, **mask) for cell in cells]).view(shape)


def rendered(mask: Mask, geometry: ScoreShape) -> torch.Tensor:
    found = mask.rendered(geometry, 'cpu')
    return torch.ones(B, H, geometry.queries, geometry.keys, dtype=torch.bool) if found is None else found.expand(B, H, -1, -1)


@pytest.mark.parametrize(
    'geometry',
    [ScoreShape(4, 4), ScoreShape(3, 5), ScoreShape(1, 6), ScoreShape(4, 7, 2), ScoreShape(1, 5, 1), ScoreShape(5, 3)],
)
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('past', [None, 0, 2])
@pytest.mark.parametrize('ahead', [None, 0, 1])
@pytest.mark.parametrize('prefix', [None, 2, 'rows'])
def test_distance(geometry, causal, past, ahead, prefix):
    prefix = torch.tensor([1, 3]) if prefix == 'rows' else prefix
    mask = Mask(prefix=prefix).narrowed(causal, past, ahead)
    want = by_formula(geometry, causal=causal, past=past, ahead=ahead, prefix=prefix)
    assert torch.equal(rendered(mask, geometry), want)
    open_rows = mask.open_rows(geometry)
    assert torch.equal(
        want.any(-1),
        torch.ones(want.shape[:3], dtype=torch.bool) if open_rows is None else open_rows.expand(B, H, -1, 1)[..., 0],
    )
    placed = Placed(torch.tensor([geometry.first]), geometry.queries, geometry.own)
    if geometry.front == 0:
        assert torch.equal(rendered(Mask(prefix=prefix, placed=placed).narrowed(causal, past, ahead), geometry), want)


def test_the_narrower_window_holds():
    mask = Mask(ahead=3).narrowed(False, 4, 2)
    assert (mask.past, mask.ahead) == (4, 2)
    assert mask.narrowed(False, 1, 5).narrowed(False, None) is mask.narrowed(False, 1, 2)
    assert mask.narrowed(True, None, 1).ahead is None


@pytest.mark.parametrize('front', [0, 1, 3])
@pytest.mark.parametrize('closable', [None, 1])
@pytest.mark.parametrize('dense', [None, (4, 5), (H, 4, 5), (B, 1, 4, 5), 'all'])
def test_given_masks(front, closable, dense):
    torch.manual_seed(front)
    geometry = ScoreShape(4, 5 + front, front)
    parts = {'keys': torch.rand(B, 5) > 0.4}
    if closable and front:
        parts['front'] = torch.rand(B, closable) > 0.5
    if dense is not None:
        parts['dense'] = torch.rand((B, H, 4, geometry.keys) if dense == 'all' else dense) > 0.3
    mask = Mask(causal=True, **parts)
    assert torch.equal(rendered(mask, geometry), by_formula(geometry, causal=True, **parts))
    empty = ~by_formula(geometry, causal=True, **parts).any(-1)
    open_rows = mask.open_rows(geometry)
    assert not empty.any() if open_rows is None else torch.equal(~open_rows.expand(B, H, 4, 1)[..., 0], empty)


def test_no_larger_than_what_it_depends_on():
    keys = torch.ones(B, 6, dtype=torch.bool)
    assert Mask().rendered(ScoreShape(6, 6), 'cpu') is None
    assert Mask(keys=keys).rendered(ScoreShape(6, 6)).shape == (B, 1, 1, 6)
    assert Mask(causal=True).rendered(ScoreShape(6, 6), 'cpu').shape == (1, 1, 6, 6)
    assert Mask(keys=keys, causal=True).rendered(ScoreShape(6, 6)).shape == (B, 1, 6, 6)
    assert Mask(keys=keys, causal=True).rendered(ScoreShape(1, 6)).shape == (B, 1, 1, 6)


def test_layers_share():
    mask = Mask(keys=torch.ones(B, 4, dtype=torch.bool))
    first, second = mask.narrowed(True, None), mask.narrowed(True, None)
    assert first is second
    assert first.rendered(ScoreShape(4, 4)) is second.rendered(ScoreShape(4, 4))
    assert first.narrowed(True, None) is first
    other = first.having(keys=torch.zeros(B, 4, dtype=torch.bool))
    assert not other.rendered(ScoreShape(4, 4)).any()


def test_plain_causal():
    causal = Mask(causal=True)
    assert causal.plain_causal(ScoreShape(4, 4))
    assert not causal.plain_causal(ScoreShape(3, 4))
    assert not causal.plain_causal(ScoreShape(4, 5, 1))
    assert not causal.plain_causal(ScoreShape(1, 1))
    assert not causal.having(keys=torch.ones(1, 4, dtype=torch.bool)).plain_causal(ScoreShape(4, 4))
    assert Mask(causal=True, past=9).plain_causal(ScoreShape(4, 4))
    assert not Mask(causal=True, past=1).plain_causal(ScoreShape(4, 4))


def test_packed_sequences_see_themselves():
    packed = PackedSequences.of({'cu_seqlens_q': torch.tensor([0, 2, 5]), 'cu_seqlens_k': torch.tensor([0, 2, 5])})
    mask = Mask(causal=True).within(packed)
    assert mask is not Mask(causal=True)
    assert mask.within(packed) is mask
    seen = mask.rendered(ScoreShape(5, 5), 'cpu')[0, 0]
    want = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()
    assert torch.equal(seen, want)


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'cu_seqlens_q': torch.tensor([0, 2])}, 'must hold cu_seqlens_k'),
        ({'cu_seqlens_q': torch.tensor([0, 2]), 'cu_seqlens_k': torch.tensor([0.0, 2])}, 'whole numbers'),
        ({'cu_seqlens_q': torch.tensor([0, 2]), 'cu_seqlens_k': torch.tensor([0, 2, 3])}, 'same number of sequences'),
        ({'cu_seqlens_q': torch.tensor([0, 2, 2]), 'cu_seqlens_k': torch.tensor([0, 2, 3])}, 'strictly increasing'),
        (
            {'cu_seqlens_q': torch.tensor([0, 1, 3]), 'cu_seqlens_k': torch.tensor([0, 2, 3])},
            'cu_seqlens_q must equal cu_seqlens_k',
        ),
    ],
)
def test_packed_sequences_are_checked(given, says):
    with pytest.raises(ValueError, match=says):
        PackedSequences.of(given, causal=True)
