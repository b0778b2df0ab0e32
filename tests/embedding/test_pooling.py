"""One vector for a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from x_transformers.embedding.pooling import AttentionPool, average, read_cls
from x_transformers.flags.base import FlagError


def test_average_over_what_the_mask_names() -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [False, False, True]])
    torch.testing.assert_close(average(x, mask), torch.stack((x[0, :2].mean(0), x[1, 2])))
    torch.testing.assert_close(average(x, None), x.mean(1))


def test_cls_tokens_are_read_off() -> None:
    x = torch.randn(2, 5, 4)
    one, rest = read_cls(x, 1)
    assert torch.equal(one, x[:, 0])
    assert torch.equal(rest, x[:, 1:])
    assert torch.equal(read_cls(x, 2)[0], x[:, :2])


def test_a_single_query_is_attention_by_hand() -> None:
    pool = AttentionPool(6, dim_context=4, heads=1, dim_head=3)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, True, False, False, True]])
    attn = pool.pooler
    q, k, v = pool.queries @ attn.to_q.weight.t(), x @ attn.to_k.weight.t(), x @ attn.to_v.weight.t()
    scores = (q @ k.transpose(1, 2) * 3**-0.5).masked_fill(~mask[:, None], -1e9)
    wanted = scores.softmax(-1) @ v @ attn.to_out.weight.t()
    torch.testing.assert_close(pool(x, mask), wanted)


@pytest.mark.parametrize('options', [{'add_residual': True}, {'depth': 2}, {'use_transformer_blocks': True}, {}])
def test_shapes_and_gradients(options: dict[str, Any]) -> None:
    pool = AttentionPool(8, num_pooled_tokens=3, dim_context=6, heads=2, dim_head=4, **options)
    out = pool(torch.randn(2, 5, 6))
    assert out.shape == (2, 3, 8)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pool.parameters())
    one = AttentionPool(8, heads=2, dim_head=4, squeeze_output=True, **options)
    assert one(torch.randn(2, 5, 8)).shape == (2, 8)


def test_residual_adds_the_queries() -> None:
    plain, more = AttentionPool(8, heads=2, dim_head=4), AttentionPool(8, heads=2, dim_head=4, add_residual=True)
    more.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(more(x), plain(x) + plain.queries)


@pytest.mark.parametrize('depth', [1, 2])
def test_flags_of_the_attention_reach_it_with_and_without_blocks(depth: int) -> None:
    pool = AttentionPool(8, heads=2, dim_head=4, depth=depth, attn_kwargs={'gate_values': True})
    assert any('to_v_gate' in name for name in pool.state_dict())
    pool(torch.randn(1, 3, 8))


def test_start_of_the_queries_and_meta_build() -> None:
    with torch.device('meta'):
        pool = AttentionPool(64, num_pooled_tokens=50)
    pool.to_empty(device='cpu').reset_parameters()
    assert pool.queries.std().item() == pytest.approx(0.01, rel=0.1)
    assert all(p.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'depth': 2, 'use_transformer_blocks': False}, 'needs use_transformer_blocks'),
        ({'depth': 2, 'add_residual': True}, 'own residuals'),
        ({'num_pooled_tokens': 2, 'squeeze_output': True}, 'num_pooled_tokens=1'),
        ({'depth': 0}, 'at least 1'),
    ],
)
def test_what_contradicts_itself(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        AttentionPool(8, **options)


@pytest.mark.parametrize('depth', [1, 2])
def test_queries_of_the_call(depth: int) -> None:
    pool = AttentionPool(6, 0, dim_context=4, heads=2, dim_head=3, depth=depth)
    assert pool.queries is None
    assert 'queries' not in pool.state_dict()
    learned = AttentionPool(6, 3, dim_context=4, heads=2, dim_head=3, depth=depth)
    learned.pooler.load_state_dict(pool.pooler.state_dict())
    assert learned.queries is not None
    x, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, True, False, False, True]])
    torch.testing.assert_close(pool(x, mask, queries=learned.queries.expand(2, -1, -1)), learned(x, mask))


def test_queries_are_either_learned_or_given() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match='queries must be given'):
        AttentionPool(6, 0, heads=2)(x)
    with pytest.raises(ValueError, match='queries must not be given'):
        AttentionPool(6, 2, heads=2)(x, queries=x)
    with pytest.raises(FlagError, match='squeeze_output'):
        AttentionPool(6, 0, squeeze_output=True)


def test_more_keywords_go_to_the_attention() -> None:
    pool = AttentionPool(6, 2, heads=2)
    out, inter = pool(torch.randn(2, 5, 6), return_intermediates=True)
    assert out.shape == (2, 2, 6)
    assert inter.post_softmax_attn.shape == (2, 2, 2, 5)
