from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from x_transformers.attention.attention import Attention
from x_transformers.attention.extra_keys import with_extra_keys
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import ExtraKeys
from x_transformers.attention.mask import Mask

B, N, D, H, W = 2, 5, 12, 4, 6


def heads_of(t, heads):
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def by_hand(attn, x, front_k, front_v, allowed=None):
    """Plain attention with keys in front; ``allowed`` (b, h, i, front + own)."""
    k = torch.cat((front_k, heads_of(attn.to_k(x), attn.kv_heads).repeat(1, front_k.shape[1] // attn.kv_heads, 1, 1)), -2)
    v = torch.cat((front_v, heads_of(attn.to_v(x), attn.kv_heads).repeat(1, front_v.shape[1] // attn.kv_heads, 1, 1)), -2)
    q, outs = heads_of(attn.to_q(x), attn.heads), []
    for h in range(attn.heads):
        scores = q[:, h] @ k[:, h % k.shape[1]].transpose(1, 2) * attn.dim_head**-0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        outs.append(scores.softmax(-1) @ v[:, h % v.shape[1]])
    return attn.to_out(torch.cat(outs, -1))


def causal_with_front(front):
    return torch.cat((torch.ones(N, front, dtype=torch.bool), torch.ones(N, N, dtype=torch.bool).tril()), -1)


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_memory_keys_are_always_visible(kv_heads):
    attn = Attention(D, heads=H, dim_head=W, kv_heads=kv_heads, value_dim_head=3, num_mem_kv=2, causal=True)
    assert attn.mem_k.shape == (kv_heads, 2, W)
    assert attn.mem_v.shape == (kv_heads, 2, 3)
    x = torch.randn(B, N, D)
    front = [t.expand(B, -1, -1, -1) for t in (attn.mem_k, attn.mem_v)]
    torch.testing.assert_close(attn(x), by_hand(attn, x, *front, allowed=causal_with_front(2)))


@pytest.mark.parametrize('extra_heads', [4, 2, 1])
@pytest.mark.parametrize('memory', [0, 2])
def test_keys_of_another_model_come_first(extra_heads, memory):
    torch.manual_seed(0)
    attn = Attention(D, heads=H, dim_head=W, kv_heads=2, num_mem_kv=memory, causal=True)
    x = torch.randn(B, N, D)
    k, v = torch.randn(B, extra_heads, 3, W), torch.randn(B, extra_heads, 3, W)
    visible = torch.tensor([[True, False, True], [True, True, False]])
    out, inter = attn(
        x, additional_key_values=(k, v), additional_key_value_mask=visible, return_intermediates=True,
    )  # fmt: skip
    mem_k, mem_v = (
        (None, None) if not memory else (t.expand(B, -1, -1, -1).repeat(1, 2, 1, 1) for t in (attn.mem_k, attn.mem_v))
    )
    k, v = (t.repeat(1, H // extra_heads, 1, 1) for t in (k, v))
    if memory:
        k, v = torch.cat((k, mem_k), -2), torch.cat((v, mem_v), -2)
    allowed = causal_with_front(3 + memory).expand(B, -1, -1).clone()
    allowed[:, :, :3] &= visible[:, None]
    torch.testing.assert_close(out, by_hand(attn, x, k, v, allowed))
    assert inter.cached_kv[0].shape == (B, 2, N, W)


def test_order_and_mask_of_the_front():
    keys, values = torch.zeros(B, 2, N, 3), torch.zeros(B, 2, N, 1)
    memory = (torch.ones(2, 4, 3), torch.ones(2, 4, 1))
    extra = ExtraKeys(torch.full((B, 2, 2, 3), 2.0), torch.full((B, 2, 2, 1), 2.0), torch.tensor([[False, True]] * B))
    k, v, mask, front = with_extra_keys(keys, values, Mask(), heads=4, memory=memory, extra=extra)
    assert front == 6
    expected = [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, *[0.0] * N]
    assert k[0, 0, :, 0].tolist() == expected
    assert v[0, 0, :, 0].tolist() == expected
    seen = mask.rendered(ScoreShape(queries=N, keys=6 + N, front=6))
    assert seen.expand(B, 1, N, -1)[0, 0, 0].tolist() == [False, *[True] * (5 + N)]


def test_biases_windows_and_pair_masks_leave_the_front_alone():
    torch.manual_seed(0)
    attn = Attention(D, heads=H, dim_head=W, num_mem_kv=2, causal=True, max_attend_past=1)
    x, bias = torch.randn(B, N, D), torch.randn(H, N, N)
    pairs = torch.rand(N, N) > 0.3
    _, inter = attn(x, attn_bias=bias, attn_mask=pairs, return_intermediates=True)
    for i in range(N):
        for j in range(N):
            weight = inter.post_softmax_attn[:, :, i, 2 + j]
            assert bool((weight > 0).all()) is bool(j <= i <= j + 1 and pairs[i, j])
    assert (inter.post_softmax_attn[..., :2] > 0).all()
    added = inter.pre_softmax_attn - inter.qk_similarities
    assert torch.allclose(added[..., :2], torch.zeros(()), atol=1e-6)
    assert torch.allclose(added[:, :, 2, 4], bias[:, 2, 2], atol=1e-5) or not pairs[2, 2]


def test_polar_memory_keys_are_magnitudes_at_angle_zero():
    attn = Attention(D, heads=H, dim_head=W, num_mem_kv=2)
    x, freqs, learned = torch.randn(B, N, D), torch.rand(1, N, W), -torch.rand(H, 1, W)
    _, inter = attn(x, polar_pos_emb=(freqs, learned), return_intermediates=True)
    q = softplus(heads_of(attn.to_q(x), H)) * (freqs - learned).cos()
    torch.testing.assert_close(inter.qk_similarities[..., :2], q @ softplus(attn.mem_k).transpose(-1, -2) * W**-0.5)


@pytest.mark.parametrize(
    ('k', 'v', 'mask', 'says'),
    [
        ((B, 3, 2, W), (B, 3, 2, W), None, 'must divide the 4 query heads'),
        ((B, 4, 2, W - 1), (B, 4, 2, W), None, 'additional_key_values: keys must have shape'),
        ((B, 4, 2, W), (B, 4, 3, W), None, 'additional_key_values: values must have shape'),
        ((B, 4, 2, W), (B, 4, 2, W), (B, 3), 'additional_key_value_mask must have shape'),
    ],
)
def test_keys_that_do_not_fit_are_named(k, v, mask, says):
    attn = Attention(D, heads=H, dim_head=W)
    kv_mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=says):
        attn(torch.randn(B, N, D), additional_key_values=(torch.randn(k), torch.randn(v)), additional_key_value_mask=kv_mask)
