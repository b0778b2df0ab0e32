"""Scalable softmax against its formula, whatever hides keys, on every kernel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels import block_steps
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.attention.mask import Mask, PackedSequences
from x_transformers.flags.base import FlagError

from .formula import FixedBias, attention, may_look
from .test_kernels import SCALE, B, D, H, draw


@pytest.mark.parametrize('seed', range(60))
def test_formula_on_every_kernel(seed, monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    geometry, kv_heads, width, settings, fields, bias = draw(seed)
    settings |= {'l2_distance': False}
    attend = Attend(heads=H, logit_softclamp_value=2.0, scale=SCALE, scalable_softmax=True, **settings).double()
    for parameter in attend.parameters():
        torch.nn.init.normal_(parameter)
    shapes = (H, geometry.queries, D), (kv_heads, geometry.keys, D), (kv_heads, geometry.keys, width)
    q, k, v = (torch.randn(B, *shape, dtype=torch.float64) for shape in shapes)
    zero = settings['add_zero_kv']
    wide = geometry.with_front(1) if zero else geometry
    grown = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(geometry.queries):
                seen = sum(may_look(b, h, i, j, wide, **fields) for j in range(wide.keys))
                grown[b, h, i] = q[b, h, i] * attend.softmax_scales[h].item() * (math.log(seen) if seen else 0.0)
    sink = attend.head_attn_sink
    want = attention(
        grown, F.pad(k, (0, 0, 1, 0)) if zero else k, F.pad(v, (0, 0, 1, 0)) if zero else v, wide, scale=SCALE,
        bias=None if bias is None else FixedBias(bias), clamp=2.0 if settings['softclamp_logits'] else None,
        sink=None if sink is None else sink.tolist(), **fields,
    )  # fmt: skip
    weight, expected = torch.randn_like(want), None
    for name in ('reference', 'blocks', *(() if settings['softclamp_logits'] else ('sdpa',))):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with use_kernel(name):
            added = None if bias is None else FixedBias(bias)
            out, _ = attend.run(*leaves, mask=Mask(**fields), geometry=geometry, bias=added)
        torch.testing.assert_close(out, want, atol=1e-9, rtol=0)
        grads = torch.autograd.grad(out, [*leaves, attend.softmax_scales], weight, allow_unused=True, materialize_grads=True)
        expected = grads if expected is None else expected
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize('causal', [True, False])
def test_keys_of_a_packed_sequence_are_counted(causal):
    starts = torch.tensor([0, 2, 6])
    mask = Mask(causal=causal, packed=PackedSequences(starts, starts))
    counts = mask.seen(ScoreShape(6, 6)).flatten().tolist()
    assert counts == ([1, 2, 1, 2, 3, 4] if causal else [2, 2, 4, 4, 4, 4])


def test_it_starts_at_the_usual_size_for_a_thousand_keys():
    mean = sum(math.log(n) for n in range(1, 1025)) / 1024
    assert Attend(heads=2, scalable_softmax=True).softmax_scales.tolist() == pytest.approx([1 / mean] * 2, abs=1e-3)


@pytest.mark.parametrize('other', ['sigmoid', 'l2_distance', 'inverted_attention'])
def test_it_needs_a_softmax_of_products(other):
    with pytest.raises(FlagError, match='it sharpens a softmax of products'):
        Attend(heads=2, scalable_softmax=True, **{other: True})
