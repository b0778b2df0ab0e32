from __future__ import annotations

import math

import pytest
import torch

from x_transformers.attend import one_hot_straight_through, sparse_topk_attn
from x_transformers.attention.attend import Attend
from x_transformers.attention.weights import NORMALIZERS, softmax, softpick, stick_breaking

LOWEST = -torch.finfo(torch.float32).max


def gradient(function, logits, weight):
    logits = logits.clone().requires_grad_()
    (function(logits) * weight).sum().backward()
    return logits.grad


def test_sparse_topk_keeps_ties():
    found = sparse_topk_attn(torch.tensor([1.0, 2, 2, 3, 0]), 2)
    torch.testing.assert_close(found, torch.tensor([0, 0.2119, 0.2119, 0.5761, 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_sparse_topk_keeps_what_rounding_alone_tells_apart(dtype):
    step = torch.finfo(dtype).eps
    scores = 3 * torch.tensor([1, 1 + step, 1 - step, 1 + 2 * step, 0.999], dtype=dtype)
    kept = torch.tensor([1, 1, 1, 1, 0], dtype=dtype) / 4
    torch.testing.assert_close(sparse_topk_attn(scores, 2), kept)
    negative = (-scores).softmax(dim=-1)
    torch.testing.assert_close(sparse_topk_attn(-scores, 2), negative)


def test_sparse_topk_of_fewer_keys_keeps_all():
    logits = torch.tensor([1.0, 2, LOWEST])
    torch.testing.assert_close(sparse_topk_attn(logits, 9), logits.softmax(-1))
    assert sparse_topk_attn(logits, 3)[2] == 0


def test_straight_through_gradients():
    torch.manual_seed(0)
    logits, weight = torch.randn(3, 6), torch.randn(3, 6)
    soft = gradient(lambda t: t.softmax(-1), logits, weight)
    torch.testing.assert_close(gradient(lambda t: sparse_topk_attn(t, 2, straight_through=True), logits, weight), soft)
    torch.testing.assert_close(sparse_topk_attn(logits, 2, straight_through=True), sparse_topk_attn(logits, 2))
    hard = one_hot_straight_through(logits)
    assert torch.equal(hard, torch.nn.functional.one_hot(logits.argmax(-1), 6).float())
    torch.testing.assert_close(gradient(one_hot_straight_through, logits, weight), soft)
    warm = gradient(lambda t: (t / 2).softmax(-1), logits, weight)
    torch.testing.assert_close(gradient(lambda t: one_hot_straight_through(t, temperature=2.0), logits, weight), warm)


def test_softpick():
    out, scores, v, maps = rows(softpick=True)
    for h in range(2):
        numbers = [math.expm1(score) for score in scores[0, h].tolist()]
        total = sum(abs(number) for number in numbers) + 1e-6
        weights = [max(number, 0.0) / total for number in numbers]
        torch.testing.assert_close(maps.post_softmax_attn[0, h, 3, 1:], torch.tensor(weights))
        torch.testing.assert_close(out[0, h], sum(w * v[0, h, j] for j, w in enumerate(weights)))
    assert min(numbers) < 0  # some get nothing
    assert (maps.post_softmax_attn[..., 0] == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softpick_of_extreme_scores_is_finite(dtype):
    lowest = torch.finfo(dtype).min
    given = [[60000.0, -60000.0, lowest], [0.0, 0.0, lowest], [-3.0, -1.0, lowest], [lowest] * 3, [1e-7, 3.0, lowest]]
    scores = torch.tensor(given, dtype=dtype, requires_grad=True)
    weights = softpick(scores)
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.isfinite().all()
    assert (weights[:, 2] == 0).all()
    assert weights[:4].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize('function', [softpick, stick_breaking])
def test_no_keys_give_no_weights(function):
    assert function(torch.zeros(2, 3, 0)).shape == (2, 3, 0)


def test_stick_breaking():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    keys = torch.tensor([[True, True, False, True, True]])
    out, maps = Attend(causal=True, stick_breaking=True)(q, k, v, mask=keys)
    for h in range(2):
        for i in range(5):
            left, want = 1.0, torch.zeros(8, dtype=torch.float64)
            for j in reversed(range(i)):
                if keys[0, j]:
                    part = 1 / (1 + math.exp(-(q[0, h, i] @ k[0, h, j]).item() * 8**-0.5))
                    torch.testing.assert_close(maps.post_softmax_attn[0, h, i, j].item(), left * part)
                    want, left = want + left * part * v[0, h, j], left * (1 - part)
            torch.testing.assert_close(out[0, h, i], want)
    assert (out[:, :, 0] == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_stick_breaking_of_extreme_scores_is_finite(dtype):
    lowest = torch.finfo(dtype).min
    scores = torch.tensor([[30000.0, -30000.0, lowest], [lowest] * 3, [-1.0, 30000.0, 0.0]], dtype=dtype, requires_grad=True)
    weights = stick_breaking(scores)
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.isfinite().all()
    assert weights.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]]


def test_softmax_is_wide_in_half_precision():
    torch.manual_seed(0)
    scores = torch.randn(4, 9).bfloat16()
    assert softmax(scores).dtype == torch.float32
    assert softmax(scores, wide=False).dtype == torch.bfloat16
    assert softmax(scores.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ('settings', 'name'),
    [
        ({}, 'softmax'),
        ({'gumbel_softmax': True}, 'gumbel_softmax'),
        ({'sparse_topk': 2}, 'sparse_topk'),
        ({'sparse_topk': 2, 'sparse_topk_straight_through': True}, 'sparse_topk_straight_through'),
        ({'hard': True}, 'hard'),
        ({'sigmoid': True}, 'sigmoid'),
        ({'softpick': True}, 'softpick'),
        ({'causal': True, 'stick_breaking': True}, 'stick_breaking'),
        ({'custom_attn_fn': torch.relu}, 'custom_attn_fn'),
    ],
)
def test_one_way_from_scores_to_weights_is_on(settings, name):
    assert [rule.name for rule in Attend(**settings).rule_types if rule in NORMALIZERS] == [name]


def rows(**settings):
    """(output, scores of what may be seen, values, map) of attention with a causal mask and one forbidden key."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    keys = torch.tensor([[False, True, True, True]])
    attend = Attend(causal=True, **settings)
    out, maps = attend(q, k, v, mask=keys)
    scores = (q @ k.mT * 8**-0.5)[:, :, 3, 1:]
    assert (out[:, :, 0] == 0).all()  # sees only the forbidden key
    return out[:, :, 3], scores, v[:, :, 1:], maps


def test_sigmoid():
    out, scores, v, _ = rows(sigmoid=True)
    torch.testing.assert_close(out, (scores.sigmoid()[..., None] * v).sum(-2))


def test_hard():
    out, scores, v, maps = rows(hard=True)
    for h in range(2):
        torch.testing.assert_close(out[0, h], v[0, h, scores[0, h].argmax()])
    assert set(maps.post_softmax_attn.unique().tolist()) == {0.0, 1.0}


def test_sparse_topk():
    out, scores, v, _ = rows(sparse_topk=2)
    for h in range(2):
        best = scores[0, h].topk(2)
        torch.testing.assert_close(out[0, h], best.values.softmax(-1) @ v[0, h, best.indices])


def test_custom_function_sees_forbidden_scores_as_the_lowest():
    out, scores, v, maps = rows(custom_attn_fn=torch.relu)
    torch.testing.assert_close(out, (scores.relu()[..., None] * v).sum(-2))
    assert (maps.pre_softmax_attn[..., 0] == LOWEST).all()


def test_gumbel_is_random_and_recorded():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    attend = Attend(gumbel_softmax=True, gumbel_softmax_hard=False).eval()
    first, maps = attend(q, k, v)
    second, _ = attend(q, k, v)
    assert not torch.equal(first, second)
    torch.testing.assert_close(maps.post_softmax_attn @ v, first)


def test_dropout_only_while_training():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    attend = Attend(dropout=0.5)
    dropped, maps = attend(q, k, v)
    kept, _ = attend.eval()(q, k, v)
    torch.testing.assert_close(kept, Attend()(q, k, v)[0])
    assert not torch.allclose(dropped, kept)
    torch.testing.assert_close(maps.post_softmax_attn @ v, kept)
