from __future__ import annotations

import pytest
import torch

from x_transformers.attention.attention import Attention
from x_transformers.attention.heads import merge_heads, split_heads
from x_transformers.attention.project import append_to_past
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.position.positions import RotaryPositions, unrotated

B, N, D = 2, 7, 12


def angles(length: int, width: int = 4) -> torch.Tensor:
    rates = 10000 ** -(torch.arange(0, width, 2) / width)
    return (torch.arange(length)[:, None] * rates).repeat_interleave(2, dim=-1)[None]


def test_heads_are_consecutive_channels():
    t = torch.randn(2, 3, 8)
    heads = split_heads(t, 4)
    for h in range(4):
        assert torch.equal(heads[:, h], t[..., 2 * h : 2 * h + 2])
    assert torch.equal(merge_heads(heads), t)


def test_memories_come_first_and_are_not_cached():
    past = LayerCache()
    first = torch.arange(5.0).reshape(1, 1, 5, 1)
    (whole,) = append_to_past(past, 2, False, k=first)
    assert whole.flatten().tolist() == [0, 1, 2, 3, 4]
    (whole,) = append_to_past(past, 1, False, k=torch.tensor([10.0, 11.0]).reshape(1, 1, 2, 1))
    assert whole.flatten().tolist() == [10, 2, 3, 4, 11]
    assert past.get('k').flatten().tolist() == [2, 3, 4, 11]


@pytest.mark.parametrize('heads', [None, 2])
def test_rotation_is_undone(heads):
    k = torch.randn(B, 3, N, 6)
    placed = RotaryPositions(angles(N), 1.0).keys(k, heads)
    assert not torch.allclose(placed, k)
    torch.testing.assert_close(unrotated(placed, angles(N)[..., ::2], heads), k)


def test_cached_keys_are_reported_without_rotation():
    torch.manual_seed(0)
    attn = Attention(D, heads=3, dim_head=6, causal=True, rotate_num_heads=2)
    x = torch.randn(B, N, D)
    plain = split_heads(attn.to_k(x), 3)
    cache = None
    for start, end in ((0, 4), (4, 6), (6, 7)):
        _, cache = attn(x[:, start:end], rotary_pos_emb=(angles(end), 1.0), cache=cache, return_intermediates=True)
        assert cache.cache.get('angles') is not None
        torch.testing.assert_close(cache.cached_kv[0], plain[:, :, :end])


def test_a_cache_of_unrotated_keys_can_be_continued():
    torch.manual_seed(0)
    attn = Attention(D, heads=2, dim_head=6, causal=True)
    x = torch.randn(B, N, D)
    _, cache = attn(x[:, :5], rotary_pos_emb=(angles(5), 1.0), return_intermediates=True)
    cache.cached_kv = cache.cached_kv
    full = attn(x, rotary_pos_emb=(angles(N), 1.0))
    rest, _ = attn(x[:, 5:], rotary_pos_emb=(angles(N), 1.0), cache=cache, return_intermediates=True)
    torch.testing.assert_close(rest, full[:, 5:])


def test_rotated_cache_without_rotary_is_refused():
    attn = Attention(D, heads=2, dim_head=6, causal=True)
    x = torch.randn(B, N, D)
    _, cache = attn(x, rotary_pos_emb=(angles(N), 1.0), return_intermediates=True)
    with pytest.raises(ValueError, match='rotated keys'):
        attn(x[:, :1], cache=cache)


def test_context_is_projected_once():
    torch.manual_seed(0)
    attn = Attention(D, heads=2, dim_head=6, dim_context=5)
    x, context = torch.randn(B, N, D), torch.randn(B, 4, 5)
    full = attn(x, context=context)
    out, cache = attn(x[:, :3], context=context, return_intermediates=True)
    torch.testing.assert_close(out, full[:, :3])
    mask = torch.ones(B, 4, dtype=torch.bool)
    rest, cache = attn(x[:, 3:], context=context[:, :0], context_mask=mask, cache=cache, return_intermediates=True)
    torch.testing.assert_close(rest, full[:, 3:])
    assert cache.cached_kv[0].shape[-2] == 4
