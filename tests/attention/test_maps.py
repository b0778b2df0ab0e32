from __future__ import annotations

import pytest
import torch

from x_transformers.attend import log_prob_from_hard_attend
from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.attention.mask import Mask

from .formula import FixedBias


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))


@pytest.mark.parametrize('settings', [{}, {'head_learned_sink': True}, {'add_zero_kv': True}, {'l2_distance': True}], ids=str)
def test_fused_maps_are_the_reference_s(qkv, settings):
    attend, geometry = Attend(heads=4, **settings), ScoreShape(5, 5)
    mask, bias = Mask(causal=True, keys=torch.rand(2, 5) > 0.3), FixedBias(torch.randn(1, 4, 5, 5))
    with use_kernel('sdpa'):
        _, lazy = attend.run(*qkv, mask=mask, geometry=geometry, bias=bias, return_attn=True)
    with use_kernel('reference'):
        _, eager = attend.run(*qkv, mask=mask, geometry=geometry, bias=bias, return_attn=True)
    assert lazy.records == {}
    for name in ('qk_similarities', 'pre_softmax', 'post_softmax', 'next_layer_scores'):
        torch.testing.assert_close(getattr(lazy, name), getattr(eager, name), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(lazy.post_softmax.square().sum(), qkv[0])
    (expected,) = torch.autograd.grad(eager.post_softmax.square().sum(), qkv[0])
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0


def test_nothing_is_kept_unless_asked(qkv):
    for kernel in ('sdpa', 'reference'):
        with use_kernel(kernel):
            _, maps = Attend().run(*qkv, mask=Mask(), geometry=ScoreShape(5, 5))
        assert maps.qk_similarities is None
        assert maps.post_softmax is None
        assert maps.next_layer_scores is None


def test_maps_in_the_precision_of_the_run(qkv):
    with torch.autocast('cpu', torch.bfloat16):
        _, maps = Attend().run(*qkv, mask=Mask(), geometry=ScoreShape(5, 5), return_attn=True)
    assert maps.post_softmax.dtype == torch.bfloat16


def test_handing_on_computes_scores_once(qkv):
    _, maps = Attend(causal=True).run(*qkv, mask=Mask(causal=True), geometry=ScoreShape(5, 5), return_scores=True)
    assert list(maps.records) == ['scores']
    assert maps.next_layer_scores is maps.pre_softmax


def test_log_prob_of_hard_attention(qkv):
    _, maps = Attend(hard=True, causal=True)(*qkv)
    found = log_prob_from_hard_attend(maps)
    scores = maps.pre_softmax_attn
    for b in range(2):
        for h in range(4):
            for i in range(5):
                torch.testing.assert_close(found[b, h, i], scores[b, h, i].log_softmax(-1).max())
    with pytest.raises(ValueError, match='must hold attention maps'):
        log_prob_from_hard_attend(Intermediates())
