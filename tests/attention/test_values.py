from __future__ import annotations

import pytest
import torch

from x_transformers.attention.attention import Attention
from x_transformers.attention.values import mix_values
from x_transformers.helpers import without_component

B, N, D = 2, 6, 12


def heads_of(t, heads):
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize(('kv_heads', 'value_dim_head'), [(4, 6), (2, 3)])
def test_value_norm_has_gains_per_kv_head(kv_heads, value_dim_head):
    attn = Attention(D, heads=4, dim_head=6, kv_heads=kv_heads, value_dim_head=value_dim_head, value_rmsnorm=True)
    assert attn.value_rmsnorm.gamma.shape == (kv_heads, 1, value_dim_head)
    torch.nn.init.normal_(attn.value_rmsnorm.gamma)
    x = torch.randn(B, N, D)
    _, inter = attn(x, return_intermediates=True)
    v = heads_of(attn.to_v(x), kv_heads)
    normed = v / v.norm(dim=-1, keepdim=True) * value_dim_head**0.5 * (attn.value_rmsnorm.gamma + 1)
    torch.testing.assert_close(inter.cached_kv[1], normed)
    torch.testing.assert_close(inter.values, v)


def test_fixed_mix_is_half_and_half():
    own, first = torch.randn(B, 2, N, 3), torch.randn(B, 2, N, 3)
    torch.testing.assert_close(mix_values(own, first), (own + first) / 2)


def test_lengths_that_differ_are_aligned_at_the_newest():
    own, first = torch.randn(B, 2, 5, 3), torch.randn(B, 2, 3, 3)
    mixed = mix_values(own, first)
    assert torch.equal(mixed[:, :, :2], own[:, :, :2])
    torch.testing.assert_close(mixed[:, :, 2:], (own[:, :, 2:] + first) / 2)
    torch.testing.assert_close(mix_values(first, own), (first + own[:, :, 2:]) / 2)


@pytest.mark.parametrize('mems', [0, 3])
@pytest.mark.parametrize('latent', [False, True])
@pytest.mark.parametrize('kv_heads', [4, 2])
def test_learned_mix_is_decided_by_the_token_of_the_value(mems, latent, kv_heads):
    torch.manual_seed(0)
    flags = {'use_latent_q': True, 'dim_latent_q': 5} if latent else {}
    attn = Attention(D, heads=4, dim_head=6, kv_heads=kv_heads, learned_value_residual_mix=True, **flags)
    x, mem = torch.randn(B, N, D), torch.randn(B, mems, D) if mems else None
    first = torch.randn(B, kv_heads, mems + N, 6)
    out, inter = attn(x, mem=mem, value_residual=first, return_intermediates=True)
    tokens = x if mem is None else torch.cat((mem, x), 1)
    share = attn.to_value_residual_mix(attn.to_latent_q(tokens) if latent else tokens)
    own = heads_of(attn.to_v(tokens), kv_heads)
    v = torch.empty_like(own)
    for h in range(kv_heads):
        w = share[..., h, None]
        v[:, h] = (1 - w) * first[:, h] + w * own[:, h]
    torch.testing.assert_close(inter.cached_kv[1], v[:, :, mems:])
    torch.testing.assert_close(inter.values, own)
    per_head = torch.stack([inter.post_softmax_attn[:, h] @ v[:, h % kv_heads] for h in range(4)], dim=2)
    torch.testing.assert_close(out, attn.to_out(per_head.flatten(2)))


@pytest.mark.parametrize('dim_context', [D, 5])
@pytest.mark.parametrize('latent', [False, True])
def test_learned_mix_of_a_context(dim_context, latent):
    flags = {'use_latent_q': True, 'dim_latent_q': 7} if latent else {}
    attn = Attention(D, heads=4, dim_head=6, dim_context=dim_context, learned_value_residual_mix=True, **flags)
    x, context, first = torch.randn(B, N, D), torch.randn(B, 3, dim_context), torch.randn(B, 4, 3, 6)
    _, inter = attn(x, context=context, value_residual=first, return_intermediates=True)
    tokens = attn.to_latent_q(context) if latent and dim_context == D else context
    share = attn.to_value_residual_mix(tokens).transpose(1, 2)[..., None]
    torch.testing.assert_close(inter.cached_kv[1], first + share * (heads_of(attn.to_v(context), 4) - first))


def test_laser_attends_over_exponentials():
    attn = Attention(D, heads=2, dim_head=6, laser=True, laser_softclamp_value=3.0, num_mem_kv=2, causal=True)
    x = torch.randn(B, N, D)
    out, inter = attn(x, return_intermediates=True)
    v = torch.cat((attn.mem_v.expand(B, -1, -1, -1), heads_of(attn.to_v(x), 2)), dim=-2)
    expected = (inter.post_softmax_attn @ (3 * (v / 3).tanh()).exp()).clamp(min=1e-20).log()
    torch.testing.assert_close(out, attn.to_out(expected.transpose(1, 2).flatten(2)))


def test_component_is_removed():
    out, along = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    left = without_component(out, along)
    assert (left * along).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(left + (out * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True) * along, out)


@pytest.mark.parametrize(('whole', 'per_head'), [(True, False), (False, True), (True, True)])
def test_outputs_are_orthogonal_to_the_token_s_own_values(whole, per_head):
    torch.manual_seed(0)
    attn = Attention(
        D, heads=4, kv_heads=2, dim_head=6, value_dim_head=5, causal=True,
        orthog_projected_values=whole, orthog_projected_values_per_head=per_head,
    )  # fmt: skip
    x, mem = torch.randn(B, N, D), torch.randn(B, 2, D)
    seen = []
    attn.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, inter = attn(x, mem=mem, return_intermediates=True)
    own = heads_of(attn.to_v(x), 2).repeat(1, 2, 1, 1).transpose(1, 2)
    plain = inter.post_softmax_attn @ heads_of(attn.to_v(torch.cat((mem, x), 1)), 2).repeat(1, 2, 1, 1)
    plain = plain.transpose(1, 2)
    parts = seen[0].split(20, dim=-1)
    assert len(parts) == whole + per_head
    for part in parts:
        torch.testing.assert_close(part, without_component(plain.flatten(2), own.flatten(2)))
        assert (part * own.flatten(2)).sum(-1).abs().max() < 1e-5


def test_orthogonal_values_need_the_tokens_own_values():
    attn = Attention(D, heads=2, dim_head=6, orthog_projected_values=True)
    with pytest.raises(ValueError, match='context must be None'):
        attn(torch.randn(B, N, D), context=torch.randn(B, N, D))


def test_laser_of_a_row_that_sees_nothing():
    """The logarithm is taken of 1e-20 at least."""
    attn = Attention(D, heads=2, dim_head=6, laser=True)
    seen = []
    attn.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attn(torch.randn(1, 2, D), context=torch.randn(1, 3, D), context_mask=torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], -46.0517), atol=1e-3, rtol=0)


@pytest.mark.parametrize('flags', [{}, {'kv_heads': 2}, {'value_rmsnorm': True, 'laser': True, 'num_mem_kv': 2}], ids=str)
def test_exclusive_attention_leaves_out_what_lies_along_the_own_value(flags):
    torch.manual_seed(0)
    attn = Attention(D, heads=4, dim_head=6, value_dim_head=3, causal=True, exclusive=True, **flags).double()
    plain = Attention(D, heads=4, dim_head=6, value_dim_head=3, causal=True, **flags).double()
    plain.load_state_dict(attn.state_dict())
    attn.to_out, plain.to_out = torch.nn.Identity(), torch.nn.Identity()
    x, mem = torch.randn(B, N, D).double(), torch.randn(B, 3, D).double()
    found, seen = attn(x, mem=mem, return_intermediates=True)
    attended, found = heads_of(plain(x, mem=mem), 4), heads_of(found, 4)
    values = seen.cached_kv[1]
    for b in range(B):
        for h in range(4):
            for i in range(N):
                y, v = attended[b, h, i], values[b, h % values.shape[1], i]
                torch.testing.assert_close(found[b, h, i], y - (y @ v) / (v @ v) * v)


def test_exclusive_attention_is_about_one_sequence():
    attn = Attention(D, heads=2, dim_head=6, exclusive=True)
    with pytest.raises(ValueError, match='context must be None with exclusive'):
        attn(torch.randn(B, N, D), context=torch.randn(B, 3, D))
