"""Masks without a mask: causality of queries put in front, padding in channels of its own. Equal to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels import sdpa
from x_transformers.attention.kernels.base import CallFacts, KernelArgs
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.attention.mask import Mask

B, H, D = 3, 4, 8


def padded(own: int, *, left: bool = False) -> Tensor:
    """Rows of different lengths, one of them empty."""
    lengths = torch.tensor([own, own // 2, 0])[:, None]
    place = torch.arange(own)
    return place >= own - lengths if left else place < lengths


def holes(own: int) -> Tensor:
    torch.manual_seed(3)
    return torch.rand(B, own) > 0.5


# (geometry, fields of the mask, settings of attention, kv heads, width of the values)
CASES = {
    'padding': (ScoreShape(9, 9), {'keys': padded(9)}, {}, H, D),
    'left padding': (ScoreShape(9, 9), {'keys': padded(9, left=True)}, {}, H, D),
    'holes': (ScoreShape(9, 9), {'keys': holes(9)}, {}, H, D),
    'memory keys': (ScoreShape(9, 11, 2), {}, {}, H, D),
    'memory keys and padding': (ScoreShape(9, 11, 2), {'keys': padded(9)}, {}, H, D),
    'zero key': (ScoreShape(9, 9), {}, {'add_zero_kv': True}, H, D),
    'zero key and left padding': (ScoreShape(9, 9), {'keys': padded(9, left=True)}, {'add_zero_kv': True}, H, D),
    'memories before the tokens': (ScoreShape(9, 11), {'keys': holes(11)}, {}, H, D),
    'memories, memory keys and a zero key': (ScoreShape(12, 14, 1), {'keys': holes(13)}, {'add_zero_kv': True}, H, D),
    'one kv head': (ScoreShape(9, 10, 1), {'keys': padded(9)}, {}, 1, D),
    'grouped kv heads': (ScoreShape(9, 10, 1), {'keys': padded(9, left=True)}, {}, 2, D),
    'narrow values': (ScoreShape(9, 10, 1), {'keys': holes(9)}, {}, H, 3),
    'wide values': (ScoreShape(9, 9), {'keys': holes(9)}, {}, 2, 21),
    'distances': (ScoreShape(9, 9), {'keys': padded(9)}, {'l2_distance': True}, H, D),
    'a window that shows all': (ScoreShape(9, 9), {'keys': padded(9), 'past': 8}, {}, H, D),
    'large scale': (ScoreShape(9, 9), {'keys': padded(9)}, {'scale': 30.0}, H, D),
}


def both(monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], int]:
    """(output and gradients of this kernel, those of the reference, how often the trick was used)."""
    geometry, fields, settings, kv_heads, width = CASES[case]
    used: list[Any] = []
    trick = sdpa.with_lead
    monkeypatch.setattr(sdpa, 'copies_pay', lambda args, lead: True)
    monkeypatch.setattr(sdpa, 'with_lead', lambda *args: used.append(args) or trick(*args))
    torch.manual_seed(0)
    shapes = (H, geometry.queries, D), (kv_heads, geometry.keys, D), (kv_heads, geometry.keys, width)
    given = [torch.randn(B, *shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(B, H, geometry.queries, width, dtype=torch.float64)
    found = []
    for name in ('sdpa', 'reference'):
        leaves = [t.to(dtype if name == 'sdpa' else torch.float64).requires_grad_() for t in (t.clone() for t in given)]
        with use_kernel(name):
            out, _ = Attend(heads=H, **settings).run(*leaves, mask=Mask(causal=True, **fields), geometry=geometry)
        found.append([out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))])
    return found[0], found[1], len(used)


@pytest.mark.parametrize('case', CASES)
def test_queries_in_front_and_channels_of_padding_give_what_a_mask_gives(case, monkeypatch):
    got, want, used = both(monkeypatch, case, torch.float64)
    assert used == 1
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(('dtype', 'close'), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('case', ['padding', 'left padding', 'memory keys and padding', 'zero key and left padding', 'holes'])
def test_no_precision_lets_padding_through(case, dtype, close, monkeypatch):
    geometry, fields, *_ = CASES[case]
    got, want, used = both(monkeypatch, case, dtype)
    assert used == 1
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=close, rtol=close)
    hidden = ~fields['keys'][:, None, :, None].expand(-1, H, -1, D)
    for gradient in got[2:]:
        assert (gradient[:, :, geometry.front :][hidden] == 0).all()


@pytest.mark.parametrize(
    ('geometry', 'fields'),
    [
        (ScoreShape(9, 9), {'keys': padded(9), 'past': 3}),
        (ScoreShape(9, 9), {'keys': padded(9), 'prefix': 2}),
        (ScoreShape(9, 11, 2), {'keys': padded(9), 'front': torch.tensor([[True, False]]).expand(B, -1)}),
        (ScoreShape(9, 9), {'dense': torch.ones(9, 9, dtype=torch.bool).tril(-1)}),
        (ScoreShape(9, 20), {'keys': holes(20)}),
        (ScoreShape(9, 7), {'keys': holes(7)}),
    ],
)
def test_what_the_trick_cannot_say_is_masked(geometry, fields, monkeypatch):
    monkeypatch.setitem(CASES, 'this', (geometry, fields, {}, 2, D))
    got, want, used = both(monkeypatch, 'this', torch.float64)
    assert used == 0
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def test_what_is_copied_or_written_out_is_decided_by_counting_numbers() -> None:
    def facts(queries: int, keys: int, width: int = 64) -> CallFacts:
        return CallFacts('cpu', torch.float32, False, False, 8, 8, width, width, ScoreShape(queries, keys))

    # n * n against 3 * n * width
    assert not sdpa.writes_more_than_it_reads(facts(192, 192))
    assert sdpa.writes_more_than_it_reads(facts(193, 193))
    assert sdpa.writes_more_than_it_reads(facts(64, 64, 8))
    assert not sdpa.writes_more_than_it_reads(facts(1, 4096))

    def args(queries: int, keys: int, padded: bool) -> KernelArgs:
        q, k = torch.zeros(1, 8, queries, 64), torch.zeros(1, 8, keys, 64)
        mask = Mask(causal=True, keys=torch.ones(1, keys, dtype=torch.bool) if padded else None)
        return KernelArgs(q, k, k, mask, ScoreShape(queries, keys), tuple, scale=1.0)

    assert not sdpa.copies_pay(args(64, 64, False), 0)
    assert sdpa.copies_pay(args(80, 96, False), 16)
    assert not sdpa.copies_pay(args(128, 128, True), 0)
    assert sdpa.copies_pay(args(256, 256, True), 0)
