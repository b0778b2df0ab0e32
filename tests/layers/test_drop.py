from __future__ import annotations

import random

import pytest
import torch

from x_transformers.layers.drop import dropout_seq, is_dropped


def test_layers_are_dropped_in_training_only() -> None:
    random.seed(0)
    assert not any(is_dropped(0.9, training=False) for _ in range(50))
    assert not any(is_dropped(0.0, training=True) for _ in range(50))
    share = sum(is_dropped(0.3, training=True) for _ in range(2000)) / 2000
    assert 0.25 < share < 0.35


@pytest.mark.parametrize(('dropout', 'kept'), [(0.5, 5), (0.25, 7), (0.99, 1), (0.0, 10)])
def test_tokens_keep_their_order(dropout: float, kept: int) -> None:
    torch.manual_seed(0)
    seq = torch.arange(10.0).view(1, 10, 1).expand(4, 10, 2)
    out, mask = dropout_seq(seq, None, dropout)
    assert mask is None
    assert out.shape == (4, kept, 2)
    assert bool((out[:, 1:, 0] > out[:, :-1, 0]).all())


def test_other_tokens_each_time() -> None:
    torch.manual_seed(0)
    seq = torch.arange(50.0).view(1, 50, 1)
    assert not torch.equal(dropout_seq(seq, None, 0.5)[0], dropout_seq(seq, None, 0.5)[0])


def test_padding_is_dropped_first() -> None:
    torch.manual_seed(0)
    seq = torch.arange(10.0).view(1, 10, 1).expand(3, 10, 1)
    counts = torch.tensor([10, 5, 2])
    valid = torch.arange(10) < counts[:, None]
    out, mask = dropout_seq(seq, valid, 0.5)
    assert out.shape == (3, 5, 1)
    assert mask.sum(dim=-1).tolist() == [5, 3, 1]
    # what the new mask keeps was valid before
    assert bool((out.squeeze(-1)[mask] < counts.repeat_interleave(torch.tensor([5, 3, 1]))).all())
