"""Keys that are shared out among queries."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.functional import normalize

from x_transformers import Decoder
from x_transformers.attention.attention import Attention

B, N, J, D, H, W = 2, 5, 4, 12, 2, 6


def filled(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def heads(t, count=H):
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


def shared_out(scores, rows, keys):
    """The formula, one number at a time."""
    weights = torch.zeros_like(scores)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            for j in range(scores.shape[3]):
                share = [scores[b, h, i, j].exp() if rows[b, i] else torch.tensor(0.0) for i in range(scores.shape[2])]
                for i in range(scores.shape[2]):
                    weights[b, h, i, j] = share[i] / sum(share) if keys[b, j] else 0.0
            for i in range(scores.shape[2]):
                weights[b, h, i] /= max(weights[b, h, i].sum().item(), 1e-8)
    return weights


def test_keys_are_shared_out_among_queries_by_hand():
    attn = filled(Attention(D, heads=H, dim_head=W, dim_context=7, inverted_attention=True))
    x, context = torch.randn(B, N, D), torch.randn(B, J, 7)
    rows = torch.tensor([[True] * N, [True, False, True, True, False]])
    keys = torch.tensor([[True, True, False, True], [True] * J])
    out, inter = attn(x, context, mask=rows, context_mask=keys, return_intermediates=True)
    q, k, v = heads(attn.to_q(x)), heads(attn.to_k(context)), heads(attn.to_v(context))
    weights = shared_out(q @ k.transpose(-1, -2) * W**-0.5, rows, keys)
    torch.testing.assert_close(inter.post_softmax_attn, weights)
    wanted = attn.to_out((weights @ v).transpose(1, 2).flatten(2)).masked_fill(~rows[..., None], 0.0)
    torch.testing.assert_close(out, wanted)


def test_every_other_way_to_weights_is_over_the_queries_too():
    x = torch.randn(B, N, D)
    hard = filled(Attention(D, heads=H, dim_head=W, inverted_attention=True, hard=True))
    _, inter = hard(x, return_intermediates=True)
    chosen = torch.zeros_like(inter.pre_softmax_attn).scatter(2, inter.pre_softmax_attn.argmax(dim=2, keepdim=True), 1.0)
    torch.testing.assert_close(inter.post_softmax_attn, normalize(chosen, p=1, dim=-1, eps=1e-8))
    sparse = filled(Attention(D, heads=H, dim_head=W, inverted_attention=True, sparse_topk=2))
    _, inter = sparse(x, return_intermediates=True)
    least = inter.pre_softmax_attn.topk(2, dim=2).values[:, :, -1:]
    kept = inter.pre_softmax_attn.masked_fill(inter.pre_softmax_attn < least, float('-inf')).softmax(dim=2)
    torch.testing.assert_close(inter.post_softmax_attn, normalize(kept, p=1, dim=-1))


def test_a_query_that_no_key_chooses_has_a_gradient_of_usual_size():
    attn = filled(Attention(D, heads=H, dim_head=W, inverted_attention=True, hard=True))
    x = torch.randn(B, N, D, requires_grad=True)
    out, inter = attn(x, return_intermediates=True)
    assert (inter.post_softmax_attn.sum(dim=-1) == 0).any()
    out.sum().backward()
    assert x.grad.abs().max() < 1e4


def test_it_is_refused_where_it_cannot_be():
    for flags in ({'causal': True}, {'flash': True}, {'head_learned_sink': True}, {'cog_signed': True}):
        with pytest.raises(ValueError, match='inverted_attention'):
            Attention(D, inverted_attention=True, **flags)
    with pytest.raises(ValueError, match='attn_inverted_attention'):
        Decoder(dim=D, depth=1, attn_inverted_attention=True)


def test_a_causal_stack_warns_and_does_not_cache(caplog):
    with caplog.at_level(logging.WARNING, logger='x_transformers'):
        stack = Decoder(dim=D, depth=1, heads=H, cross_attend=True, cross_attn_inverted_attention=True)
    assert 'cross_attn_inverted_attention' in caplog.text
    assert not stack.can_cache_kv
