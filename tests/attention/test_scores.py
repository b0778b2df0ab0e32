"""Each rule for scores against its formula, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers.attend import create_causal_mask, onnx_create_causal_mask, qk_l2_dist_squared, selective_attn
from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.scores.contextual import CoPE
from x_transformers.attention.scores.similarity import as_products

from .formula import FixedBias

B, H, N, D = 2, 3, 5, 4


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3))


def causal_scores(q, k, scale=D**-0.5):
    return (torch.einsum('bhid,bhjd->bhij', q, k) * scale).masked_fill(create_causal_mask(N, N, None), -math.inf)


def mixed(weight, t):
    """Head g of the result is the sum over heads h of weight[g, h] times head h."""
    out = torch.zeros_like(t)
    for g in range(H):
        for h in range(H):
            out[:, g] += weight[g, h, 0, 0] * t[:, h]
    return out


def test_squared_distance():
    torch.manual_seed(0)
    q, k, shared = torch.randn(B, H, N, D), torch.randn(B, H, 6, D), torch.randn(B, 6, D)
    want = torch.tensor(
        [[[[(q[b, h, i] - k[b, h, j]).square().sum() for j in range(6)] for i in range(N)] for h in range(H)] for b in range(B)]
    )
    torch.testing.assert_close(qk_l2_dist_squared(q, k), want)
    torch.testing.assert_close(qk_l2_dist_squared(q, shared), qk_l2_dist_squared(q, shared[:, None].expand(-1, H, -1, -1)))


@pytest.mark.parametrize(('dtype', 'atol'), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_distance_as_products(dtype, atol):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 6, 64).to(dtype) for _ in range(2))
    one, other = as_products(q, k, whole=True)
    found = -(one.float() @ other.float().transpose(-1, -2))
    torch.testing.assert_close(found, qk_l2_dist_squared(q.float(), k.float()), atol=atol, rtol=0)


def test_softclamp_after_bias(qkv):
    q, k, v = qkv
    bias = torch.randn(1, H, N, N, dtype=torch.float64)
    attend = Attend(softclamp_logits=True, logit_softclamp_value=0.5, causal=True)
    _, maps = attend(q, k, v, attn_bias=bias)
    want = 0.5 * ((q @ k.mT * D**-0.5 + bias) / 0.5).tanh()
    future = create_causal_mask(N, N, None)
    torch.testing.assert_close(maps.pre_softmax_attn, want.masked_fill(future, -torch.finfo(torch.float64).max))
    torch.testing.assert_close(maps.qk_similarities, q @ k.mT * D**-0.5)


def test_talking_heads(qkv):
    q, k, v = qkv
    names = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')
    attend = Attend(heads=H, causal=True, **dict.fromkeys(names, True)).double()
    assert list(attend.state_dict()) == [
        'pre_softmax_talking_heads.weight',
        'post_softmax_talking_heads.weight',
        'pre_scale_post_talking_heads.weight',
    ]
    for weight in attend.parameters():
        torch.testing.assert_close(weight[..., 0, 0], torch.eye(H, dtype=torch.float64))
        torch.nn.init.normal_(weight)
    before, after, around = attend.parameters()
    similar = q @ k.mT * D**-0.5
    scores = (similar + mixed(before, similar)).masked_fill(create_causal_mask(N, N, None), -math.inf)
    weights = mixed(after, scores.softmax(-1)) * mixed(around, similar)
    torch.testing.assert_close(attend(q, k, v)[0], weights @ v)


def test_previous_scores_never_overflow(qkv):
    q, k, v = (t.float().requires_grad_() for t in qkv)
    names = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')
    attend = Attend(heads=H, causal=True, **dict.fromkeys(names, True))
    for weight in attend.parameters():
        torch.nn.init.normal_(weight, std=3.0)
    mask, geometry = Mask(causal=True), ScoreShape(N, N)
    _, maps = attend.run(q, k, v, mask=mask, geometry=geometry, return_attn=True)
    out, second = attend.run(q, k, v, mask=mask, geometry=geometry, previous=maps.next_layer_scores, return_attn=True)
    torch.testing.assert_close(second.qk_similarities.tril(), (q @ k.mT * D**-0.5 + maps.pre_softmax).tril())
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (q, k, v, *attend.parameters()))


def test_previous_scores_without_the_sink(qkv):
    q, k, v = qkv
    attend = Attend(heads=H, causal=True, head_learned_sink=True).double()
    torch.nn.init.normal_(attend.head_attn_sink)
    geometry, mask = ScoreShape(N, N), Mask(causal=True)
    _, maps = attend.run(q, k, v, mask=mask, geometry=geometry, return_attn=True)
    assert maps.pre_softmax.shape == (B, H, N, N + 1)
    assert maps.next_layer_scores.shape == (B, H, N, N)
    out, _ = attend.run(q, k, v, mask=mask, geometry=geometry, previous=maps.next_layer_scores)
    scores = causal_scores(q, k) * 2
    column = attend.head_attn_sink.view(1, H, 1, 1).expand(B, H, N, 1)
    weights = torch.cat((column, scores), -1).softmax(-1)[..., 1:]
    torch.testing.assert_close(out, weights @ v)


def test_signed_weights_with_sink(qkv):
    q, k, v = qkv
    attend = Attend(heads=H, causal=True, cog_signed=True, head_learned_sink=True).double()
    torch.nn.init.normal_(attend.head_attn_sink)
    out, maps = attend(q, k, v)
    sink, scores = attend.head_attn_sink, q @ k.mT * D**-0.5
    want = torch.zeros_like(out)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                row = torch.cat((sink[h : h + 1], scores[b, h, i, : i + 1]))
                weights = row.abs().softmax(0) * row.sign()
                torch.testing.assert_close(maps.post_softmax_attn[b, h, i, : i + 2], weights)
                want[b, h, i] = weights[1:] @ v[b, h, : i + 1]
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('talking', [False, True])
@pytest.mark.parametrize('queries', [N, 1, 2])
def test_contextual_positions(qkv, soft, talking, queries):
    q, k, v = qkv
    q = q[:, :, N - queries :]
    cope = CoPE(D, H, 3, soft_onehot=soft, talking_heads=talking, soft_onehot_temp=0.3).double()
    torch.nn.init.normal_(cope.pos_emb)
    attend = Attend(heads=H, causal=True, cope=cope)
    out, _ = attend(q, k, v)
    similar = q @ k.mT * D**-0.5
    counted = mixed(cope.talking_heads.weight, similar) if talking else similar
    want = torch.zeros_like(out)
    for b in range(B):
        for h in range(H):
            for i in range(queries):
                seen = N - queries + i + 1
                by_position = [float(q[b, h, i] @ cope.pos_emb[p].detach()) for p in range(3)]
                row = []
                for j in range(seen):
                    p = min(sum(1 / (1 + math.exp(-float(counted[b, h, i, t].detach()))) for t in range(j, seen)), 2.0)
                    if soft:
                        near = [math.exp(-abs(p - whole) / 0.3) for whole in range(3)]
                        added = sum(n * z for n, z in zip(near, by_position, strict=True)) / sum(near)
                    else:
                        share = p - math.floor(p)
                        added = (1 - share) * by_position[math.floor(p)] + share * by_position[math.ceil(p)]
                    row.append(similar[b, h, i, j] + added)
                want[b, h, i] = torch.stack(row).softmax(0) @ v[b, h, :seen]
    torch.testing.assert_close(out, want)


def test_contextual_positions_learn_and_load(qkv):
    q, k, v = qkv
    cope = CoPE(D, H, 3, soft_onehot=True, talking_heads=True).double()
    assert sorted(cope.state_dict()) == ['pos_emb', 'positions', 'talking_heads.weight']
    attend = Attend(heads=H, causal=True, cope=cope)
    attend(q, k, v)[0].sum().backward()
    assert cope.pos_emb.grad.abs().sum() > 0
    with torch.device('meta'):
        empty = CoPE(D, H, 3, soft_onehot=True)
    empty.to_empty(device='cpu').reset_parameters()
    assert empty.positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize('spare_first', [True, False])
def test_selective(spare_first):
    torch.manual_seed(0)
    queries, keys = 4, 6
    sim, gate = torch.randn(B, H, queries, keys), torch.randn(B, queries, keys)
    first = keys - queries
    for given in (None, gate):
        decided = sim[:, 0] if given is None else given
        want = sim.clone()
        for i in range(queries):
            for j in range(keys):
                for t in range(i):
                    if j > first - (not spare_first) and j != first + t:
                        want[:, :, i, j] -= decided[:, t, j].clamp(min=0)[:, None]
        torch.testing.assert_close(selective_attn(sim, given, no_mask_sos=spare_first), want)


def test_selective_inside_attention(qkv):
    q, k, v = qkv
    out, _ = Attend(causal=True, selective=True)(q, k, v)
    scores = (q @ k.mT * D**-0.5).masked_fill(create_causal_mask(N, N, None), -torch.finfo(torch.float64).max)
    torch.testing.assert_close(out, selective_attn(scores).softmax(-1) @ v)


@pytest.mark.parametrize(('i', 'j'), [(3, 3), (2, 5), (1, 4)])
def test_causal_masks(i, j):
    want = torch.tensor([[key > row + j - i for key in range(j)] for row in range(i)])
    assert torch.equal(create_causal_mask(i, j, None), want)
    assert torch.equal(onnx_create_causal_mask(i, j, 'cpu'), want)


def test_bias_leaves_the_front_alone(qkv):
    q, k, v = qkv
    bias = torch.randn(1, H, N, N - 1, dtype=torch.float64)
    out, _ = Attend().run(q, k, v, mask=Mask(), geometry=ScoreShape(N, N, 1), bias=FixedBias(bias))
    added = torch.cat((torch.zeros(1, H, N, 1), bias), -1)
    torch.testing.assert_close(out, (q @ k.mT * D**-0.5 + added).softmax(-1) @ v)
