"""Polar positions against the formula, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers.position.polar import PolarEmbedding, apply_polar_pos_emb
from x_transformers.position.positions import PolarPositions


def test_embedding() -> None:
    emb = PolarEmbedding(4, heads=2)
    assert {k: tuple(v.shape) for k, v in emb.state_dict().items()} == {'learned_bias': (2, 1, 4), 'inv_freq': (4,)}
    freqs, bias = emb(torch.tensor([3, 5]))
    for row, p in enumerate((3, 5)):
        assert freqs[0, row].tolist() == pytest.approx([p * 10000 ** (-k / 4) for k in range(4)], rel=1e-5)
    assert (bias == 0).all()
    with torch.no_grad():
        emb.learned_bias[0] = 1.0
        emb.learned_bias[1] = -7.0
    _, bias = emb(torch.arange(2))
    assert (bias[0] == 0).all()
    assert (bias[1] == -2 * math.pi).all()
    spread = PolarEmbedding(50, heads=4, bias_uniform_init=True).learned_bias
    assert -2 * math.pi <= spread.min() < -5
    assert -1 < spread.max() <= 0


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('batched', [False, True])
def test_scores(kv_heads: int, batched: bool) -> None:
    heads, d = 4, 3
    emb = PolarEmbedding(d, heads, bias_uniform_init=True)
    pos = torch.stack([torch.arange(5), torch.arange(5) * 2 + 1]) if batched else torch.arange(5)
    positions = PolarPositions(*emb(pos))
    q, k = torch.randn(2, heads, 3, d), torch.randn(2, kv_heads, 5, d)
    placed_q, placed_k = positions.queries(q), positions.keys(k)
    assert placed_k.shape == (2, kv_heads, 5, 2 * d)
    found = torch.stack([placed_q[:, h] @ placed_k[:, h % kv_heads].transpose(-1, -2) for h in range(heads)], dim=1)
    for b in range(2):
        at = (pos[b] if batched else pos).tolist()
        for h in range(heads):
            for i in range(3):
                for j in range(5):
                    score = 0.0
                    for c in range(d):
                        length = math.log1p(math.exp(q[b, h, i, c])) * math.log1p(math.exp(k[b, h % kv_heads, j, c]))
                        # keys are turned by their position and the bias of the head
                        turn = (at[2 + i] - at[j]) * 10000 ** (-c / d) - float(emb.learned_bias[h, 0, c].detach())
                        score += length * math.cos(turn)
                    assert float(found[b, h, i, j].detach()) == pytest.approx(score, abs=1e-4)
    if kv_heads == heads and not batched:
        freqs, bias = emb(pos)
        public = apply_polar_pos_emb(q, freqs) @ apply_polar_pos_emb(k, freqs + bias).transpose(-1, -2)
        torch.testing.assert_close(found, public, atol=1e-5, rtol=1e-5)


def test_unplaced_keys_have_angle_zero() -> None:
    emb = PolarEmbedding(3, heads=2)
    k = torch.randn(1, 2, 4, 3)
    zero = PolarPositions(*emb(torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(zero.unplaced_keys(k), zero.keys(k))


def test_alignment_and_refusals() -> None:
    emb = PolarEmbedding(3, heads=2)
    positions = PolarPositions(*emb(torch.arange(-2, 4)))
    k = torch.randn(1, 2, 6, 3)
    whole = positions.keys(k)
    torch.testing.assert_close(positions.keys(k[:, :, :2], before=4), whole[:, :, :2])
    torch.testing.assert_close(positions.keys(k[:, :, -1:]), whole[:, :, -1:])
    assert positions.cache_form == 'raw'
    with pytest.raises(ValueError, match=r'cover the 7 rows that keys reach over, .*got 6'):
        positions.keys(torch.randn(1, 2, 7, 3))
    with pytest.raises(ValueError, match='must be all 2'):
        positions.keys(k, heads=1)
    with pytest.raises(ValueError, match=r'cover all 7 tokens, .*got 6'):
        apply_polar_pos_emb(torch.randn(1, 2, 7, 3), emb(torch.arange(6))[0])


def test_bias_learns_and_builds_without_memory() -> None:
    emb = PolarEmbedding(3, heads=2, bias_uniform_init=True)
    positions = PolarPositions(*emb(torch.arange(4)))
    t = torch.randn(1, 2, 4, 3)
    (positions.queries(t) * positions.keys(t)).sum().backward()
    assert (emb.learned_bias.grad != 0).any()
    with torch.device('meta'):
        empty = PolarEmbedding(3, heads=2)
    empty.to_empty(device='cpu')
    empty.reset_parameters()
    assert torch.equal(empty.inv_freq, emb.inv_freq)
    assert (empty.learned_bias == 0).all()
