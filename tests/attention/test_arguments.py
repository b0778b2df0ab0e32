"""What one call of attention may say: causality, and what is added inside."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Decoder, Encoder
from x_transformers.attention.attention import Attention
from x_transformers.attention.kernels.choose import use_kernel

B, N, J, D, H, W = 2, 5, 4, 12, 2, 6


def filled(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def heads(t, count=H):
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


# ---------------------------------------------------------------- causality by call


@pytest.mark.parametrize('flags', [{}, {'flash': True}, {'max_attend_past': 2}])
@pytest.mark.parametrize('causal', [False, True])
def test_causality_of_the_call_is_that_of_a_layer_built_so(flags, causal):
    attn, other = (filled(Attention(D, heads=H, dim_head=W, causal=built, **flags)) for built in (not causal, causal))
    other.load_state_dict(attn.state_dict())
    x = torch.randn(B, N, D)
    torch.testing.assert_close(attn(x, causal=causal), other(x))


def test_a_stack_is_causal_by_call():
    flags = {'dim': D, 'depth': 2, 'heads': H, 'attn_dim_head': W, 'cross_attend': True, 'rotary_pos_emb': True}
    encoder, decoder = Encoder(**flags, verbose=False), Decoder(**flags, verbose=False)
    filled(encoder)
    decoder.load_state_dict(encoder.state_dict())
    x, context = torch.randn(B, N, D), torch.randn(B, J, D)
    torch.testing.assert_close(encoder(x, context=context, causal=True), decoder(x, context=context))
    torch.testing.assert_close(decoder(x, context=context, causal=False), encoder(x, context=context))
    _, cache = encoder(x[:, :3], context=context, causal=True, return_hiddens=True)
    continued = encoder(x, context=context, causal=True, cache=cache)
    torch.testing.assert_close(continued, decoder(x, context=context)[:, 3:])
    with pytest.raises(ValueError, match='not causal'):
        decoder(x, context=context, causal=False, cache=cache)


def test_what_was_built_for_one_causality_refuses_the_other():
    x = torch.randn(B, N, D)
    with pytest.raises(ValueError, match='selective'):
        Attention(D, causal=True, selective=True)(x, causal=False)
    with pytest.raises(ValueError, match='attn_data_dependent_alibi'):
        Encoder(dim=D, depth=1, attn_data_dependent_alibi=True)(x, causal=True)
    with pytest.raises(ValueError, match='shift_tokens'):
        Encoder(dim=D, depth=1, shift_tokens=1)(x, causal=True)
    with pytest.raises(TypeError, match='causal'):
        Attention(D)(x, causal=1)


# ---------------------------------------------------------------- deltas


def test_deltas_by_hand():
    attn = filled(Attention(D, heads=H, kv_heads=1, dim_head=W, value_dim_head=4, causal=True, gate_values=True))
    x = torch.randn(B, N, D)
    added = {
        'q_delta': torch.randn(B, N, H * W),
        'k_delta': torch.randn(B, N, W),
        'v_delta': torch.randn(B, N, 4),
        'o_delta': torch.randn(B, N, H * 4),
        'attn_delta': torch.randn(H, N, N),
    }
    q = heads(attn.to_q(x) + added['q_delta'])
    k, v = heads(attn.to_k(x) + added['k_delta'], 1), heads(attn.to_v(x) + added['v_delta'], 1)
    scores = (q @ k.transpose(-1, -2) * W**-0.5).masked_fill(torch.ones(N, N).triu(1).bool(), float('-inf'))
    out = ((scores.softmax(dim=-1) + added['attn_delta']) @ v).transpose(1, 2).flatten(2) + added['o_delta']
    torch.testing.assert_close(attn(x, **added), attn.to_out(out * attn.to_v_gate(x).sigmoid()))


def test_memory_keys_get_no_part_of_what_is_added_to_weights():
    attn = filled(Attention(D, heads=H, dim_head=W, num_mem_kv=2, add_zero_kv=True))
    x, delta = torch.randn(B, N, D), torch.randn(N, N)
    _, plain = attn(x, return_intermediates=True)
    _, inter = attn(x, attn_delta=delta, return_intermediates=True)
    torch.testing.assert_close(inter.post_softmax_attn[..., 3:], plain.post_softmax_attn[..., 3:] + delta)
    torch.testing.assert_close(inter.post_softmax_attn[..., :3], plain.post_softmax_attn[..., :3])


def test_deltas_with_a_cache_are_those_of_the_new_tokens():
    attn = filled(Attention(D, heads=H, dim_head=W, causal=True))
    x, k_delta, weights = torch.randn(B, N, D), torch.randn(B, N, H * W), torch.randn(N, N).tril()
    whole = attn(x, k_delta=k_delta, attn_delta=weights)
    _, cache = attn(x[:, :3], k_delta=k_delta[:, :3], return_intermediates=True)
    rest = attn(x[:, 3:], k_delta=k_delta[:, 3:], attn_delta=weights[3:], cache=cache)
    torch.testing.assert_close(rest, whole[:, 3:])


@pytest.mark.parametrize('name', ['q_delta', 'k_delta', 'v_delta', 'o_delta'])
@pytest.mark.parametrize('shape', [(H * W,), (1, H * W), (N, H * W), (1, 1, H * W), (B, 1, H * W), (1, N, H * W), (1,), ()])
def test_deltas_broadcast(name, shape):
    attn, x, delta = Attention(D, heads=H, dim_head=W), torch.randn(B, N, D), torch.randn(shape)
    torch.testing.assert_close(attn(x, **{name: delta}), attn(x, **{name: delta.expand(B, N, H * W)}))


def test_deltas_of_the_wrong_kind_are_refused():
    attn, x = Attention(D, heads=H, dim_head=W), torch.randn(B, N, D)
    for name in ('q_delta', 'k_delta', 'v_delta', 'o_delta'):
        with pytest.raises(ValueError, match=name):
            attn(x, **{name: torch.randn(B, N, H * W + 1)})
        with pytest.raises(ValueError, match=name):
            attn(x, **{name: torch.randn(1, B, N, H * W)})
        with pytest.raises(TypeError, match=f'{name} must be a tensor'):
            attn(x, **{name: 1.0})
    with pytest.raises(ValueError, match='attn_delta'):
        attn(x, attn_delta=torch.randn(N, N + 1))
    with pytest.raises(ValueError, match='k_delta'):
        Attention(D, heads=H, dim_head=W, use_latent_kv=True, dim_latent_kv=4)(x, k_delta=torch.randn(B, N, H * W))
    with use_kernel('sdpa'), pytest.raises(ValueError, match='added to the weights'):
        attn(x, attn_delta=torch.randn(N, N))


# ---------------------------------------------------------------- log probabilities


def test_log_probs_of_every_attention():
    stack = filled(Decoder(dim=D, depth=2, heads=H, attn_dim_head=W, attn_hard=True))
    x = torch.randn(B, N, D)
    _, record = stack(x, return_gumbel_log_probs=True, return_hiddens=True)
    for inter in record.attn_intermediates:
        torch.testing.assert_close(inter.log_probs, inter.pre_softmax_attn.log_softmax(dim=-1).amax(dim=-1))
    _, record = stack(x, return_hiddens=True)
    assert record.attn_intermediates[0].log_probs is None
