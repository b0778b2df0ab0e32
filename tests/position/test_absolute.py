"""Absolute positions against the table and the sines."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers.flags.base import FlagError
from x_transformers.position.absolute import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding


def rows_of(emb: AbsolutePositionalEmbedding, at: list[int]) -> torch.Tensor:
    rows = emb.emb.weight[torch.tensor(at)]
    return rows / rows.norm(dim=-1, keepdim=True) if emb.l2norm_embed else rows * 4**-0.5


@pytest.mark.parametrize('l2norm_embed', [False, True])
def test_learned(l2norm_embed: bool) -> None:
    emb = AbsolutePositionalEmbedding(4, 8, l2norm_embed=l2norm_embed)
    assert list(emb.state_dict()) == ['emb.weight']
    x = torch.zeros(2, 3, dtype=torch.long)
    torch.testing.assert_close(emb(x), rows_of(emb, [0, 1, 2]))
    torch.testing.assert_close(emb(x, offset=4), rows_of(emb, [4, 5, 6]))
    torch.testing.assert_close(emb(x, pos=torch.tensor([7, 0, 3])), rows_of(emb, [7, 0, 3]))
    both = emb(x, pos=torch.tensor([[7, 0, 3], [1, 1, 2]]))
    torch.testing.assert_close(both, torch.stack([rows_of(emb, [7, 0, 3]), rows_of(emb, [1, 1, 2])]))
    late = emb(x, seq_start_pos=torch.tensor([0, 2]), offset=1)
    torch.testing.assert_close(late, torch.stack([rows_of(emb, [1, 2, 3]), rows_of(emb, [0, 0, 1])]))
    embedded = torch.zeros(2, 3, 4)
    torch.testing.assert_close(emb(embedded), emb(x))


def test_learned_ends_with_its_table() -> None:
    emb = AbsolutePositionalEmbedding(4, 8)
    assert emb(torch.zeros(1, 8)).shape == (8, 4)
    with pytest.raises(ValueError, match='max_seq_len = 8, got position 9'):
        emb(torch.zeros(1, 9))
    with pytest.raises(ValueError, match='got position 9'):
        emb(torch.zeros(1, 3), offset=6)


def test_positions_may_come_twice_in_a_row_that_is_longer_than_the_table() -> None:
    emb = AbsolutePositionalEmbedding(4, 8)
    pos = torch.arange(8).repeat(2)
    torch.testing.assert_close(emb(torch.zeros(1, 16), pos=pos), rows_of(emb, pos.tolist()))
    with pytest.raises(IndexError, match='range from 0 to 8'):
        emb(torch.zeros(1, 9), pos=torch.arange(9))


def test_learned_starts_as_told() -> None:
    emb = AbsolutePositionalEmbedding(64, 64, init_std=1e-5)
    assert 0.5e-5 < emb.emb.weight.std() < 2e-5
    with torch.device('meta'):
        empty = AbsolutePositionalEmbedding(64, 64)
    empty.to_empty(device='cpu')
    empty.reset_parameters()
    assert 0.9 < empty.emb.weight.std() < 1.1


def sines(at: list[float], scale: float) -> torch.Tensor:
    omega = [10000 ** (-k / 3) for k in range(3)]
    return torch.tensor([[math.sin(p * w) * scale for w in omega] + [math.cos(p * w) * scale for w in omega] for p in at])


def test_sinusoidal() -> None:
    emb = ScaledSinusoidalEmbedding(6)
    assert list(emb.state_dict()) == ['scale']
    c = 6**-0.5
    x = torch.zeros(2, 3)
    torch.testing.assert_close(emb(x), sines([0, 1, 2], c))
    torch.testing.assert_close(emb(x, offset=4), sines([4, 5, 6], c))
    pos = torch.tensor([[7, 0, 3], [1, 1, 2]])
    torch.testing.assert_close(emb(x, pos=pos), torch.stack([sines([7, 0, 3], c), sines([1, 1, 2], c)]))
    late = emb(x, seq_start_pos=torch.tensor([0, 2]), offset=1)
    torch.testing.assert_close(late, torch.stack([sines([1, 2, 3], c), sines([0, 0, 1], c)]))
    with torch.no_grad():
        emb.scale.fill_(2.0)
    torch.testing.assert_close(emb(x), sines([0, 1, 2], 2.0))


def test_sinusoidal_edges() -> None:
    with pytest.raises(FlagError, match='even width'):
        ScaledSinusoidalEmbedding(5)
    with torch.device('meta'):
        empty = ScaledSinusoidalEmbedding(6)
    empty.to_empty(device='cpu')
    empty.reset_parameters()
    x = torch.zeros(1, 4)
    torch.testing.assert_close(empty(x), ScaledSinusoidalEmbedding(6)(x))
    half = ScaledSinusoidalEmbedding(6).bfloat16()
    assert half(x, offset=3000).dtype == torch.bfloat16
    torch.testing.assert_close(half(x, offset=3000)[:, :1].float(), emb_at(3000)[:, :1], atol=0.02, rtol=0.02)


def emb_at(offset: int) -> torch.Tensor:
    return sines([offset + i for i in range(4)], 6**-0.5)
