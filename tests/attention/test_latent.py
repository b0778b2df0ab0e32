from __future__ import annotations

import pytest
import torch

from x_transformers.attention.attention import Attention

B, N, D = 2, 7, 12


def angles(length: int, width: int = 4) -> torch.Tensor:
    rates = 10000 ** -(torch.arange(0, width, 2) / width)
    return (torch.arange(length)[:, None] * rates).repeat_interleave(2, dim=-1)[None]


def latent_attention(**flags):
    torch.manual_seed(0)
    kwargs = {'heads': 4, 'dim_head': 6, 'causal': True, 'use_latent_q': True, 'dim_latent_q': 5}
    kwargs.update(use_latent_kv=True, dim_latent_kv=7)
    return Attention(D, **{**kwargs, **flags})


def test_keys_and_values_come_through_the_latent():
    attn = latent_attention(value_dim_head=3)
    x = torch.randn(B, N, D)
    z = attn.to_latent_kv(x)
    k, v = attn.to_k(z).unflatten(-1, (4, 6)), attn.to_v(z).unflatten(-1, (4, 3))
    q = attn.to_q(attn.to_latent_q(x)).unflatten(-1, (4, 6))
    expected = torch.zeros(B, N, 4, 3)
    for i in range(N):
        for h in range(4):
            weights = (q[:, i, None, h] * k[:, : i + 1, h]).sum(-1).mul(6**-0.5).softmax(-1)
            expected[:, i, h] = (weights[..., None] * v[:, : i + 1, h]).sum(1)
    torch.testing.assert_close(attn(x), attn.to_out(expected.flatten(2)))


def test_only_the_last_heads_are_rotated_and_they_bypass_the_latent():
    attn = latent_attention(latent_rope_subheads=2)
    x = torch.randn(B, N, D)
    _, inter = attn(x, rotary_pos_emb=(angles(N), 1.0), return_intermediates=True)
    _, plain = attn(x, return_intermediates=True)
    assert torch.allclose(inter.qk_similarities[:, :2], plain.qk_similarities[:, :2], atol=1e-6)
    assert not torch.allclose(inter.qk_similarities[:, 2:], plain.qk_similarities[:, 2:], atol=1e-3)
    latent, rope = inter.cached_kv
    torch.testing.assert_close(latent, attn.to_latent_kv(x))
    torch.testing.assert_close(rope, attn.to_rotateable_k(x).unflatten(-1, (2, 6)).transpose(1, 2))


@pytest.mark.parametrize('rope', [None, 2])
@pytest.mark.parametrize('mems', [0, 3])
@pytest.mark.parametrize('mixed', [False, True])
def test_cached_equals_full(rope, mems, mixed):
    attn = latent_attention(latent_rope_subheads=rope, learned_value_residual_mix=mixed, value_rmsnorm=True)
    x, mem = torch.randn(B, N, D), torch.randn(B, mems, D) if mems else None
    first = torch.randn(B, 4, mems + N, 6) if mixed else None
    place = {'rotary_pos_emb': (angles(mems + N), 1.0)} if rope else {}
    full = attn(x, mem=mem, value_residual=first, **place)
    cache, outs = None, []
    for start, end in ((0, 3), (3, 4), (4, N)):
        place = {'rotary_pos_emb': (angles(mems + end), 1.0)} if rope else {}
        now = None if first is None else torch.cat((first[:, :, :mems], first[:, :, mems + start : mems + end]), dim=-2)
        out, cache = attn(x[:, start:end], mem=mem, value_residual=now, cache=cache, return_intermediates=True, **place)
        assert cache.values.shape == (B, 4, mems + end - start, 6)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), full)


def test_value_residual_needs_its_own_cache():
    attn = latent_attention()
    x = torch.randn(B, N, D)
    _, cache = attn(x[:, :4], return_intermediates=True)
    with pytest.raises(ValueError, match='mixed values'):
        attn(x[:, 4:], cache=cache, value_residual=torch.randn(B, 4, 3, 6))


def test_context_of_another_width_and_its_cache():
    attn = latent_attention(causal=False, dim_context=5)
    assert attn.to_latent_kv.weight.shape == (7, 5)
    x, context = torch.randn(B, N, D), torch.randn(B, 4, 5)
    full = attn(x, context=context)
    _, cache = attn(x[:, :2], context=context, return_intermediates=True)
    torch.testing.assert_close(attn(x[:, 2:], context=context[:, :0], cache=cache), full[:, 2:])
