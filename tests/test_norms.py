"""Every norm against its formula, written out number by number."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.helpers import l2norm
from x_transformers.norms import (
    ADAPTIVE_NORMS,
    NORMS,
    AdaptiveLayerNorm,
    AdaptiveRMSNorm,
    Derf,
    DynamicTanh,
    LayerNorm,
    MultiheadRMSNorm,
    RMSNorm,
    ScaleNorm,
    SimpleRMSNorm,
    choose_norm,
    layer_norm,
    rms_norm,
)


def rows(x: Tensor) -> list[list[float]]:
    return x.detach().double().flatten(0, -2).tolist()


def standardised(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in row]


def unit_rms(row: list[float]) -> list[float]:
    length = max(math.sqrt(sum(v * v for v in row)), 1e-12)
    return [v / length * math.sqrt(len(row)) for v in row]


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def assert_rows(out: Tensor, expected: list[list[float]]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).view(out.shape)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('unit_offset', [False, True])
@pytest.mark.parametrize('shape', [(2, 5, 6), (3, 2, 5, 6)])
def test_norms_with_gain(unit_offset: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for cls, formula, name in ((LayerNorm, standardised, 'gamma'), (RMSNorm, unit_rms, 'g'), (ScaleNorm, unit_rms, 'g')):
        norm = cls(6, unit_offset=unit_offset)
        assert_rows(norm(x), [formula(row) for row in rows(x)])  # the gain starts at 1
        assert list(norm.state_dict()) == [name]
        assert (getattr(norm, name) == 1 - unit_offset).all()
        randomise(norm)
        gain = (getattr(norm, name).double() + unit_offset).expand(6).tolist()
        expected = [[v * g for v, g in zip(formula(row), gain, strict=True)] for row in rows(x)]
        assert_rows(norm(x), expected)


@pytest.mark.parametrize('cls', [AdaptiveLayerNorm, AdaptiveRMSNorm])
@pytest.mark.parametrize('per_token', [False, True])
def test_adaptive_norms(cls: type, per_token: bool) -> None:
    formula = standardised if cls is AdaptiveLayerNorm else unit_rms
    norm = cls(6, dim_condition=3)
    assert {k: tuple(v.shape) for k, v in norm.state_dict().items()} == {'to_gamma.weight': (6, 3)}
    assert (norm.to_gamma.weight == 0).all()
    assert cls(6).to_gamma.weight.shape == (6, 6)
    x = torch.randn(2, 5, 6)
    condition = torch.randn(2, 5, 3) if per_token else torch.randn(2, 3)
    assert_rows(norm(x, condition=condition), [formula(row) for row in rows(x)])
    randomise(norm)
    weight = norm.to_gamma.weight.double().tolist()
    expected = []
    for b in range(2):
        for n in range(5):
            c = (condition[b, n] if per_token else condition[b]).double().tolist()
            gain = [1 + sum(w * v for w, v in zip(line, c, strict=True)) for line in weight]
            expected.append([v * g for v, g in zip(formula(x[b, n].double().tolist()), gain, strict=True)])
    assert_rows(norm(x, condition=condition), expected)
    views = torch.randn(3, 2, 5, 6)
    stacked = norm(views, condition=condition)
    for view, out in zip(views, stacked, strict=True):
        torch.testing.assert_close(out, norm(view, condition=condition))


def test_simple_and_multihead_rms_norm() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert_rows(SimpleRMSNorm(6, unit_offset=True)(x), [unit_rms(row) for row in rows(x)])
    norm = MultiheadRMSNorm(6, heads=3)
    assert {k: tuple(v.shape) for k, v in norm.state_dict().items()} == {'gamma': (3, 1, 6)}
    assert_rows(norm(x), [unit_rms(row) for row in rows(x)])
    randomise(norm)
    gains = norm.gamma.double()[:, 0].tolist()
    expected = []
    for b in range(2):
        for h in range(3):
            for row in rows(x[b, h]):
                expected.append([v * (g + 1) for v, g in zip(unit_rms(row), gains[h], strict=True)])
    assert_rows(norm(x), expected)


@pytest.mark.parametrize('unit_offset', [False, True])
def test_squashing_norms(unit_offset: bool) -> None:
    x = torch.randn(2, 5, 6)
    tanh = DynamicTanh(6, init_alpha=0.7, unit_offset=unit_offset)
    derf = Derf(6, init_alpha=0.7, init_bias=0.2, unit_offset=unit_offset)
    assert list(tanh.state_dict()) == ['pre_tanh_scale', 'gamma', 'beta']
    assert list(derf.state_dict()) == ['alpha', 's', 'gamma', 'beta']
    assert_rows(tanh(x), [[math.tanh(v * 0.7) for v in row] for row in rows(x)])
    assert_rows(derf(x), [[math.erf(v * 0.7 + 0.2) for v in row] for row in rows(x)])
    randomise(tanh)
    randomise(derf)
    u = float(unit_offset)
    a, gamma, beta = (p.double().tolist() for p in (tanh.pre_tanh_scale, tanh.gamma, tanh.beta))
    expected = [[math.tanh(v * (a + u * 0.7)) * (g + u) + b for v, g, b in zip(r, gamma, beta, strict=True)] for r in rows(x)]
    assert_rows(tanh(x), expected)
    a, s, gamma, beta = (p.double().tolist() for p in (derf.alpha, derf.s, derf.gamma, derf.beta))
    expected = [[math.erf(v * (a + u) + s) * (g + u) + b for v, g, b in zip(r, gamma, beta, strict=True)] for r in rows(x)]
    assert_rows(derf(x), expected)


@pytest.mark.parametrize('with_gain', [False, True])
def test_gradient_of_rms_norm(with_gain: bool) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    gain = torch.randn(6, dtype=torch.double, requires_grad=True) if with_gain else None
    inputs = (x, gain) if with_gain else (x,)
    assert torch.autograd.gradcheck(rms_norm, inputs)
    assert torch.autograd.gradgradcheck(rms_norm, inputs)
    # a transposed input and a transposed gradient are as good
    turned = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t.t(), gain.detach() if with_gain else None).t(), (turned,))


def test_zero_rows_stay_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    gain = torch.ones(6, requires_grad=True)
    out = rms_norm(x, gain)
    assert (out == 0).all()
    out.sum().backward()
    assert x.grad is not None
    assert gain.grad is not None
    assert x.grad.isfinite().all()
    assert (gain.grad == 0).all()
    assert (rms_norm(torch.zeros(2, 6)) == 0).all()
    assert layer_norm(torch.zeros(2, 6)).isfinite().all()


def test_rms_norm_with_vmap() -> None:
    x, gain = torch.randn(4, 2, 6), torch.randn(6, requires_grad=True)
    loss = torch.func.grad(lambda g, t: rms_norm(t, g).pow(3).sum())
    per_sample = torch.func.vmap(loss, in_dims=(None, 0))(gain, x)
    for sample, row in zip(per_sample, x, strict=True):
        torch.testing.assert_close(sample, loss(gain, row))


@pytest.mark.parametrize('kind', NORMS)
def test_every_norm_trains_in_other_precisions(kind: str) -> None:
    norm = choose_norm(kind, 6, unit_offset=True)
    condition = {'condition': torch.randn(2, 6)} if kind in ADAPTIVE_NORMS else {}
    x = torch.randn(2, 5, 6, requires_grad=True)
    full = norm(x, **condition)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = norm(x.bfloat16(), **condition)
    mixed.sum().backward()
    torch.testing.assert_close(mixed.float(), full, rtol=0.05, atol=0.05)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for dtype, tolerance in ((torch.double, 1e-5), (torch.bfloat16, 0.05)):
        other = copy.deepcopy(norm).to(dtype)
        out = other(x.to(dtype), **{k: v.to(dtype) for k, v in condition.items()})
        assert out.dtype == dtype
        out.sum().backward()
        torch.testing.assert_close(out.float(), full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('kind', NORMS)
def test_every_norm_builds_without_memory(kind: str) -> None:
    with torch.device('meta'):
        norm = choose_norm(f'use_{kind}', 6, unit_offset=True, dim_condition=3, init_alpha=0.3)
    condition = {'condition': torch.randn(2, 3, device='meta')} if kind in ADAPTIVE_NORMS else {}
    assert norm(torch.randn(2, 5, 6, device='meta', requires_grad=True), **condition).shape == (2, 5, 6)
    norm.to_empty(device='cpu')
    norm.reset_parameters()
    fresh = choose_norm(kind, 6, unit_offset=True, dim_condition=3, init_alpha=0.3)
    for (name, filled), expected in zip(norm.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(filled, expected), name


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'batch'"):
        choose_norm('batch', 6)


def test_rms_norm_under_export() -> None:
    norm = RMSNorm(6)
    x = torch.randn(2, 5, 6)
    exported = torch.export.export(norm, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), norm(x))


def test_heads_that_give_nothing_get_no_gradient() -> None:
    norm = MultiheadRMSNorm(4, 2)
    x = torch.randn(1, 2, 3, 4)
    x[0, 1, 2] = 0
    x.requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert (out[0, 1, 2] == 0).all()
    assert (x.grad[0, 1, 2] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad[0, 0] != 0).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_a_vector_of_no_length_gets_no_gradient(dtype: torch.dtype) -> None:
    """It has no direction. A length of 1e-12 in its place made a gradient of 1e12, and infinity of that in half precision."""
    for fn in (RMSNorm(8), ScaleNorm(8), SimpleRMSNorm(8), l2norm, partial(l2norm, groups=2)):
        x = torch.randn(3, 8)
        x[1] = 0.0
        x = x.to(dtype).requires_grad_()
        out = (fn.to(dtype) if isinstance(fn, nn.Module) else fn)(x)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        (out * torch.arange(8.0).to(dtype)).sum().backward()
        assert torch.equal(x.grad[1], torch.zeros_like(x[1]))
        assert x.grad.isfinite().all()
        assert (x.grad[0] != 0).any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """As exact as torch's own RMS norm; a zero vector stays zero, and no vector is too long."""
    torch.manual_seed(0)
    norm = RMSNorm(64).to(dtype)
    torch.nn.init.normal_(norm.g)
    x = torch.randn(5, 64).to(dtype)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), norm.g, 1e-30), atol=0, rtol=0)
    plain = RMSNorm(16).to(dtype)
    assert (plain(torch.zeros(1, 16, dtype=dtype)) == 0).all()
    torch.testing.assert_close(plain(torch.full((1, 16), 3e4, dtype=dtype)), torch.ones(1, 16, dtype=dtype))
    for module in (ScaleNorm(16), SimpleRMSNorm(16), MultiheadRMSNorm(16, 1)):
        rows = torch.stack((torch.zeros(16), torch.full((16,), 3e4)))[None, None].to(dtype)
        assert module.to(dtype)(rows)[0, 0].tolist() == [[0.0] * 16, [1.0] * 16]
    assert l2norm(torch.zeros(1, 4, dtype=dtype)).tolist() == [[0.0] * 4]
    assert l2norm(torch.full((1, 4), 6e4, dtype=dtype)).tolist() == [[0.5] * 4]


@pytest.mark.parametrize(
    'flags', [{'use_rmsnorm': True, 'sandwich_norm': True}, {'attn_laser': True}, {'attn_qk_norm': True}], ids=str
)
def test_padding_on_the_left_is_harmless_in_half_precision(flags: dict) -> None:
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=2, **flags)
    net = TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=stack).half().eval()
    x, start = torch.randint(1, 24, (2, 6)), torch.tensor([0, 2])
    out = net(x, seq_start_pos=start)
    assert out.dtype == torch.float16
    assert out[0].isfinite().all()
    assert out[1, 2:].isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kind', [LayerNorm, RMSNorm])
def test_a_single_token_without_gradients_has_the_gain_of_any_other(kind, dtype):
    torch.manual_seed(0)
    norm, x = kind(16, unit_offset=True).to(dtype), torch.randn(3, 5, 16, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, std=0.5)
    expected = norm(x)
    with torch.no_grad():
        alone = torch.cat([norm(token) for token in x.split(1, dim=1)], dim=1)
    assert alone.dtype == expected.dtype
    close = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(alone, expected, atol=close, rtol=close)
