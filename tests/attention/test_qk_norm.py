from __future__ import annotations

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
