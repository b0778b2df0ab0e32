"""Tensor product attention against its formula, factor by factor."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Attention, Decoder
from x_transformers.flags.base import FlagError

B, N, D, HEADS, KV, WIDTH, VALUES, Q_RANK, KV_RANK = 2, 5, 12, 4, 2, 6, 3, 3, 2
SIZES = {'heads': HEADS, 'kv_heads': KV, 'dim_head': WIDTH, 'value_dim_head': VALUES}
RANKS = {'tensor_product_q_rank': Q_RANK, 'tensor_product_kv_rank': KV_RANK}


def made(**flags):
    torch.manual_seed(0)
    return Attention(D, causal=True, tensor_product=True, **RANKS, **SIZES, **flags).double()


def heads_of(weight, token, heads, width, rank):
    """(heads, width): the mean of outer products of a(x) and b(x), written out."""
    factors = weight @ token
    out = torch.zeros(heads, width, dtype=torch.float64)
    for r in range(rank):
        for h in range(heads):
            for c in range(width):
                out[h, c] += factors[h * rank + r] * factors[heads * rank + r * width + c] / rank
    return out


def test_formula():
    attn = made()
    attn.to_out = torch.nn.Identity()
    x = torch.randn(B, N, D, dtype=torch.float64)
    out = attn(x)
    of_keys, of_values = attn.to_latent_kv.of_keys.weight, attn.to_latent_kv.of_values.weight
    for b in range(B):
        q = [heads_of(attn.to_latent_q.weight, x[b, i], HEADS, WIDTH, Q_RANK) for i in range(N)]
        k = [heads_of(of_keys, x[b, i], KV, WIDTH, KV_RANK) for i in range(N)]
        v = [heads_of(of_values, x[b, i], KV, VALUES, KV_RANK) for i in range(N)]
        for i in range(N):
            for h in range(HEADS):
                scores = torch.stack([q[i][h] @ k[j][h % KV] / WIDTH**0.5 for j in range(i + 1)])
                want = sum(weight * v[j][h % KV] for j, weight in enumerate(scores.softmax(0)))
                torch.testing.assert_close(out[b, i, h * VALUES : (h + 1) * VALUES], want)


def test_the_cache_keeps_the_factors():
    attn = made()
    _, seen = attn(torch.randn(B, N, D).double(), return_intermediates=True)
    assert {name: tape.value.shape[-1] for name, tape in seen.cache.tapes.items()} == {
        'latent': KV_RANK * (KV + WIDTH) + KV_RANK * (KV + VALUES)
    }


def test_keys_and_values_with_views_of_their_own():
    attn = made(qkv_receive_diff_residuals=True)
    plain = made()
    plain.load_state_dict(attn.state_dict())
    x, other = torch.randn(2, B, N, D).double().unbind(0)
    out, want = attn(torch.stack((x, x, other))), plain(x)
    assert not torch.allclose(out, want)
    plain.to_latent_kv.of_values.weight.data.zero_()
    attn.to_latent_kv.of_values.weight.data.zero_()
    torch.testing.assert_close(attn(torch.stack((x, x, other))), plain(x))


def test_clipped_scores_stay_below_the_limit():
    attn = made(num_mem_kv=1)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(B, N, D).double()
    largest = attn(x, return_intermediates=True)[1].pre_softmax_attn.amax(dim=(0, 2, 3))
    tau = largest.median().item()
    attn.qk_clip_(attn(x, return_intermediates=True)[1], tau=tau)
    clipped = attn(x, return_intermediates=True)[1].pre_softmax_attn.amax(dim=(0, 2, 3))
    torch.testing.assert_close(clipped, largest.clamp(max=tau))


@pytest.mark.parametrize(
    'flags',
    [{'use_latent_q': True, 'dim_latent_q': 4}, {'use_latent_kv': True, 'dim_latent_kv': 4}, {'qkv_bias': True}],
    ids=str,
)
def test_other_projections_are_refused(flags):
    with pytest.raises(FlagError, match='outer products take the place of the projections'):
        Attention(D, tensor_product=True, **flags)


def test_it_keeps_less_than_half_of_the_usual_cache():
    usual, small = (
        Decoder(dim=64, depth=1, heads=8, attn_dim_head=16, attn_tensor_product=on)(
            torch.randn(1, 20, 64), return_hiddens=True
        )[1].kv_cache.bytes()
        for on in (False, True)
    )
    assert small < usual / 2
