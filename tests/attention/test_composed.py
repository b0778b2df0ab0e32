"""Dynamically composed heads against their formula, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers import Attention
from x_transformers.attention.attend import Attend

B, N, D, HEADS, WIDTH, RANK = 2, 4, 10, 3, 4, 2


def heads_of(t, heads):
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def matrix(part, token):
    """(heads, heads): what one token adds to the vector of all heads, as a matrix that the vector is multiplied by."""
    hidden = torch.nn.functional.gelu(part.to_hidden.weight @ token)
    found = torch.diag((part.to_gate.weight @ token).tanh())
    first = (part.to_first.weight @ hidden).view(RANK, HEADS)
    second = (part.to_second.weight @ hidden).view(RANK, HEADS)
    for r in range(RANK):
        normed = first[r] / (first[r].square().mean() + 1e-6).sqrt()
        found = found + torch.outer(normed, second[r])
    return found


@pytest.mark.parametrize('context', [False, True])
def test_formula(context):
    torch.manual_seed(0)
    dim_context = 7 if context else D
    attn = Attention(
        D, heads=HEADS, dim_head=WIDTH, dim_context=dim_context, causal=not context, composable=True, num_mem_kv=1
    ).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    attn.to_out = torch.nn.Identity()
    x = torch.randn(B, N, D, dtype=torch.float64)
    other = torch.randn(B, 3, dim_context, dtype=torch.float64) if context else x
    q, k, v = heads_of(attn.to_q(x), HEADS), heads_of(attn.to_k(other), HEADS), heads_of(attn.to_v(other), HEADS)
    k = torch.cat((attn.mem_k.expand(B, -1, -1, -1), k), dim=2)
    v = torch.cat((attn.mem_v.expand(B, -1, -1, -1), v), dim=2)
    part, out = attn.composition, torch.zeros(B, N, HEADS, WIDTH, dtype=torch.float64)
    for b in range(B):
        for i in range(N):
            columns = range(k.shape[2] if context else i + 2)
            scores = torch.zeros(HEADS, len(columns), dtype=torch.float64)
            mixed = torch.zeros_like(scores)
            for j in columns:
                products = torch.stack([q[b, h, i] @ k[b, h, j] for h in range(HEADS)]) / math.sqrt(WIDTH)
                by = matrix(part.scores_by_query, x[b, i])
                # the learned key in front has no token
                by = by + matrix(part.scores_by_key, other[b, j - 1]) if j else by
                scores[:, j] = products + products @ by
            weights = scores.softmax(dim=-1)
            for j in columns:
                by = matrix(part.weights_by_query, x[b, i])
                by = by + matrix(part.weights_by_key, other[b, j - 1]) if j else by
                mixed[:, j] = weights[:, j] + weights[:, j] @ by
                for h in range(HEADS):
                    out[b, i, h] += mixed[h, j] * v[b, h, j]
    found = attn(x, context=other) if context else attn(x)
    torch.testing.assert_close(found, out.flatten(2))


def test_it_starts_as_plain_attention():
    torch.manual_seed(0)
    attn = Attention(D, heads=HEADS, dim_head=WIDTH, causal=True, composable=True)
    plain = Attention(D, heads=HEADS, dim_head=WIDTH, causal=True)
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if not name.startswith('composition')})
    x = torch.randn(B, N, D)
    torch.testing.assert_close(attn(x), plain(x))


def test_without_what_tokens_say_it_cannot_run():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match='composition must be given'):
        Attend(heads=2, composable=True)(q, q, q)
