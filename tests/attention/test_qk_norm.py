from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from x_transformers.attention.attention import Attention
from x_transformers.attention.qk_norm import unit_heads

B, N, D = 2, 5, 12


def test_each_group_has_unit_length():
    t = torch.randn(B, 3, N, 12)
    out = unit_heads(t, 4)
    for g in range(4):
        torch.testing.assert_close(out[..., 3 * g : 3 * g + 3], normalize(t[..., 3 * g : 3 * g + 3], dim=-1))


def test_scores_are_scaled_cosines_with_gains():
    torch.manual_seed(0)
    attn = Attention(
        D, heads=4, kv_heads=2, dim_head=6, qk_norm=True, qk_norm_groups=2, qk_norm_scale=7, qk_norm_dim_scale=True
    )
    torch.nn.init.normal_(attn.qk_norm_q_scale)
    torch.nn.init.normal_(attn.qk_norm_k_scale)
    x = torch.randn(B, N, D)
    _, inter = attn(x, return_intermediates=True)
    for h in range(4):
        q = attn.to_q(x)[..., 6 * h : 6 * h + 6]
        k = attn.to_k(x)[..., 6 * (h % 2) : 6 * (h % 2) + 6]
        q, k = (torch.cat([normalize(part, dim=-1) for part in t.chunk(2, -1)], -1) for t in (q, k))
        scores = 7 * (q * attn.qk_norm_q_scale[h]) @ (k * attn.qk_norm_k_scale[h % 2]).transpose(-1, -2)
        torch.testing.assert_close(inter.qk_similarities[:, h], scores)


def test_memory_keys_are_normed_over_the_whole_head():
    torch.manual_seed(0)
    attn = Attention(D, heads=2, dim_head=6, qk_norm=True, qk_norm_groups=2, qk_norm_dim_scale=True, num_mem_kv=3)
    torch.nn.init.normal_(attn.qk_norm_k_scale)
    x = torch.randn(B, N, D)
    _, inter = attn(x, return_intermediates=True)
    q = unit_heads(attn.to_q(x).unflatten(-1, (2, 6)).transpose(1, 2), 2, attn.qk_norm_q_scale)
    expected = 10 * q @ (normalize(attn.mem_k, dim=-1) * attn.qk_norm_k_scale).transpose(-1, -2)
    torch.testing.assert_close(inter.qk_similarities[..., :3], expected)


@pytest.mark.parametrize('flags', [{'qk_rmsnorm': True}, {'k_rmsnorm': True}, {'k_rmsnorm': True, 'qk_norm': True}])
def test_rms_norm_of_heads(flags):
    attn = Attention(D, heads=4, kv_heads=2, dim_head=6, **flags)
    norms = [norm for norm in (attn.q_rmsnorm, attn.k_rmsnorm) if norm is not None]
    assert len(norms) == (2 if flags.get('qk_rmsnorm') else 1)
    for norm in norms:
        torch.nn.init.normal_(norm.gamma)
    x = torch.randn(B, N, D)
    _, inter = attn(x, return_intermediates=True)

    def rms(t, gamma):
        return t * t.square().mean(dim=-1, keepdim=True).rsqrt() * (gamma + 1)

    for h in range(4):
        q = attn.to_q(x)[..., 6 * h : 6 * h + 6]
        k = attn.to_k(x)[..., 6 * (h % 2) : 6 * (h % 2) + 6]
        if flags.get('qk_norm'):
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        q = rms(q, attn.q_rmsnorm.gamma[h]) if attn.q_rmsnorm is not None else q
        k = rms(k, attn.k_rmsnorm.gamma[h % 2])
        scores = (10 if flags.get('qk_norm') else 6**-0.5) * q @ k.transpose(-1, -2)
        torch.testing.assert_close(inter.qk_similarities[:, h], scores)


def test_one_norm_of_keys_is_enough():
    with pytest.raises(ValueError, match='qk_rmsnorm'):
        Attention(D, qk_rmsnorm=True, k_rmsnorm=True)
