"""Differential attention against its formula, head by head."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers import Attention, Decoder
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.flags.base import FlagError

B, N, D, HEADS, WIDTH, VALUES = 2, 5, 12, 4, 6, 3


def heads_of(t, heads):
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def made(**flags):
    torch.manual_seed(0)
    sizes = {'heads': HEADS, 'dim_head': WIDTH, 'value_dim_head': VALUES}
    attn = Attention(D, causal=True, differential=True, **sizes, **flags).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn


def formula(attn, x, kv_heads, start):
    """Every pair of heads by itself."""
    part = attn.differential
    q, k, v = heads_of(attn.to_q(x), HEADS), heads_of(attn.to_k(x), kv_heads), heads_of(attn.to_v(x), kv_heads)
    factor = (part.lambda_q1 @ part.lambda_k1).exp() - (part.lambda_q2 @ part.lambda_k2).exp() + start
    out = torch.zeros(B, N, HEADS * VALUES, dtype=torch.float64)
    for b in range(B):
        for pair in range(HEADS // 2):
            one, two = 2 * pair % kv_heads, (2 * pair + 1) % kv_heads
            for i in range(N):
                first = (k[b, one, : i + 1] @ q[b, 2 * pair, i] / WIDTH**0.5).softmax(-1)
                second = (k[b, two, : i + 1] @ q[b, 2 * pair + 1, i] / WIDTH**0.5).softmax(-1)
                values = torch.cat((v[b, one, : i + 1], v[b, two, : i + 1]), dim=-1)
                head = (first - factor * second) @ values
                head = head / (head.square().mean() + 1e-5).sqrt() * part.gain * (1 - start)
                out[b, i, pair * 2 * VALUES : (pair + 1) * 2 * VALUES] = head
    return attn.to_out(out)


@pytest.mark.parametrize('kernel', ['reference', 'sdpa', 'blocks'])
@pytest.mark.parametrize('kv_heads', [4, 2])
def test_formula(kv_heads, kernel):
    attn, x = made(kv_heads=kv_heads, differential_lambda_init=0.7), torch.randn(B, N, D).double()
    with use_kernel(kernel):
        torch.testing.assert_close(attn(x), formula(attn, x, kv_heads, 0.7))


def test_it_starts_as_deep_as_the_layer_lies():
    stack = Decoder(dim=D, depth=3, heads=HEADS, attn_dim_head=WIDTH, attn_differential=True, cross_attend=True)
    starts = [layer[1].differential.lambda_init for layer in stack.layers if isinstance(layer[1], Attention)]
    blocks = [0.8 - 0.6 * math.exp(-0.3 * block) for block in range(3)]
    assert starts == pytest.approx([start for start in blocks for _ in range(2)])
    assert Attention(D, heads=2, differential=True).differential.lambda_init == pytest.approx(blocks[0])
    part = stack.layers[0][1].differential
    assert torch.stack([part.lambda_q1, part.lambda_k1, part.lambda_q2, part.lambda_k2]).std().item() < 0.2
    assert part.factor().item() == pytest.approx(0.2, abs=0.3)


def test_what_is_exclusive_is_so_before_the_norm():
    attn, x = made(exclusive=True), torch.randn(B, N, D).double()
    torch.nn.init.ones_(attn.differential.gain)
    attn.to_out = torch.nn.Identity()
    out, v = heads_of(attn(x), HEADS // 2), heads_of(attn.to_v(x), HEADS // 2)
    assert (out * v).sum(-1).abs().max() < 1e-9


@pytest.mark.parametrize('flags', [{'heads': 3}, {'heads': 4, 'one_kv_head': True}, {'heads': 6, 'kv_heads': 3}], ids=str)
def test_heads_come_in_pairs(flags):
    with pytest.raises(FlagError, match='two heads are a pair'):
        Attention(D, differential=True, **flags)
