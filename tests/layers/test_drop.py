from __future__ import annotations

import random

import pytest
import torch

from x_transformers.layers.drop import dropout_seq, is_dropped
from x_transformers.layers.stack import Decoder


def test_layers_are_dropped_as_often_as_asked() -> None:
    random.seed(0)
    assert not any(is_dropped(0.0) for _ in range(50))
    share = sum(is_dropped(0.3) for _ in range(2000)) / 2000
    assert 0.25 < share < 0.35


def test_a_compiled_stack_drops_layers_too() -> None:
    stack = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, layer_dropout=0.5, pre_norm_has_final_norm=False)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8)
    (_, attend, _), (_, feed, _) = stack.layers
    norm_a, norm_f = stack.layers[0].norms[0], stack.layers[1].norms[0]
    both = x + attend(norm_a(x))
    both = both + feed(norm_f(both))
    courses = [x, x + attend(norm_a(x)), x + feed(norm_f(x)), both]
    compiled, met = torch.compile(stack, fullgraph=True, backend='eager'), set()
    for _ in range(60):
        out = compiled(x)
        fits = [index for index, course in enumerate(courses) if torch.allclose(out, course, atol=1e-5)]
        assert len(fits) == 1
        met.update(fits)
    assert met == {0, 1, 2, 3}


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
