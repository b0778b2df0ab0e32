"""PaTH against its formula: one Householder matrix after the other."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.attention.attend import Attend
from x_transformers.flags.base import FlagError

B, N, D, HEADS, KV, WIDTH = 2, 6, 12, 4, 2, 5


def heads_of(t, heads):
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def made(**flags):
    torch.manual_seed(0)
    attn = Attention(D, heads=HEADS, kv_heads=KV, dim_head=WIDTH, causal=True, path=True, path_rank=3, **flags).double()
    attn.to_out = torch.nn.Identity()
    return attn


def matrices(part, tokens, shown):
    """H of each token and key head, (n kh d d)."""
    found = []
    for t, token in enumerate(tokens):
        total = torch.zeros(KV * WIDTH, dtype=torch.float64)
        for back in range(3):
            if t - back >= 0 and shown[t - back]:
                narrow = part.to_vectors[0].weight @ tokens[t - back]
                total += part.taps[2 - back] * (part.to_vectors[1].weight @ narrow)
        w = total.view(KV, WIDTH)
        w = w / w.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        strength = 2 / (1 + (-(part.to_strength.weight @ token + part.to_strength.bias)).exp())
        eye = torch.eye(WIDTH, dtype=torch.float64)
        found.append([eye - strength[h] * torch.outer(w[h], w[h]) * bool(shown[t]) for h in range(KV)])
    return found


@pytest.mark.parametrize('mems', [0, 3])
def test_formula(mems):
    attn = made(num_mem_kv=1)
    x, mem = torch.randn(B, N, D).double(), torch.randn(B, mems, D).double()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 2] = mask[1, :2] = False
    found = heads_of(attn(x, mask=mask, mem=mem if mems else None), HEADS)
    tokens = torch.cat((mem, x), dim=1)
    shown = torch.nn.functional.pad(mask, (mems, 0), value=True)
    q, k, v = heads_of(attn.to_q(x), HEADS), heads_of(attn.to_k(tokens), KV), heads_of(attn.to_v(tokens), KV)
    for b in range(B):
        steps = matrices(attn.path_steps, tokens[b], shown[b])
        for h in range(HEADS):
            for i in range(mems, mems + N):
                if not shown[b, i]:
                    continue
                kh, query = h % KV, q[b, h, i - mems]
                scores, values = [query @ attn.mem_k[kh, 0]], [attn.mem_v[kh, 0]]
                for j in range(i + 1):
                    if shown[b, j]:
                        moved = k[b, kh, j]
                        for s in range(j + 1, i + 1):
                            moved = steps[s][kh] @ moved
                        scores.append(query @ moved)
                        values.append(v[b, kh, j])
                weights = (torch.stack(scores) / WIDTH**0.5).softmax(0)
                torch.testing.assert_close(found[b, h, i - mems], weights @ torch.stack(values))


def test_strong_steps_and_repeated_vectors_stay_finite():
    """β near 2 with one and the same w: reflections, of which two are nothing."""
    attn = made()
    torch.nn.init.constant_(attn.path_steps.to_strength.bias, 60.0)
    x = torch.randn(1, 1, D).double().expand(1, 40, D).clone().requires_grad_()
    out = attn(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_near_the_exact_numbers(dtype):
    attn = made()
    x = torch.randn(B, 30, D).double()
    want = attn(x)
    found = attn.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_pieces_of_any_length_continue_a_cache():
    torch.manual_seed(0)
    stack = Decoder(dim=D, depth=2, heads=HEADS, attn_dim_head=WIDTH, attn_kv_heads=KV, attn_path=True)
    net = TransformerWrapper(num_tokens=7, max_seq_len=20, use_abs_pos_emb=False, attn_layers=stack).double().eval()
    ids = torch.randint(0, 7, (B, 12))
    want, cache, found = net(ids), None, []
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6), (6, 12)):
        given = {} if cache is None else {'cache': cache, 'input_not_include_cache': True}
        out, cache = net(ids[:, start:stop], return_intermediates=True, **given)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, dim=1), want)


@pytest.mark.parametrize('positions', ['rotary_pos_emb', 'rotary_xpos', 'polar_pos_emb'])
def test_other_positions_that_turn_are_refused(positions):
    with pytest.raises(FlagError, match='its products are the positions'):
        Decoder(dim=D, depth=1, attn_path=True, **{positions: True})


def test_what_it_cannot_be_is_refused():
    for flags in ({}, {'causal': True, 'l2_distance': True}, {'causal': True, 'flash_pack_seq': True}):
        with pytest.raises(FlagError, match='path'):
            Attention(D, path=True, **flags)
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match='steps must be given to attention along a path'):
        Attend(heads=2, causal=True, path=True)(q, q, q)
