"""Forget gates against sums written out, in one piece and in several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.flags.base import FlagError
from x_transformers.position.forgetting import DataDependentAlibi, PerRowDataDependentAlibi

HEADS = 2


def build(kind: str) -> DataDependentAlibi | PerRowDataDependentAlibi:
    torch.manual_seed(0)
    if kind == 'row':
        return PerRowDataDependentAlibi(4, HEADS, dim_head=3, post_log_scale=0.7)
    return DataDependentAlibi(4, HEADS, causal=kind == 'causal', bias_init=0.5, post_log_scale=0.7)


def logsigmoid(value: Tensor) -> float:
    return -math.log1p(math.exp(-float(value)))


def test_one_gate_for_each_token() -> None:
    x = torch.randn(2, 5, 4)
    for kind in ('causal', 'both'):
        module = build(kind)
        linear = module.to_forget_gates[0]
        assert (linear.bias == 0.5).all()
        g = (x @ linear.weight.t() + linear.bias).detach()
        out = module(x)
        assert out.shape == (2, HEADS, 5, 5)
        for b in range(2):
            for h in range(HEADS):
                for i in range(5):
                    for j in range(5):
                        expected = sum(0.7 * logsigmoid(g[b, t, h]) for t in range(j + 1, i + 1))
                        if j > i and kind == 'both':
                            expected = sum(0.7 * logsigmoid(g[b, t, HEADS + h]) for t in range(i + 1, j + 1))
                        if j <= i or kind == 'both':
                            assert float(out[b, h, i, j].detach()) == pytest.approx(expected, abs=1e-5)


def test_one_gate_for_each_pair() -> None:
    x = torch.randn(2, 5, 4)
    module = build('row')
    both = module.to_forget_gates[0](x).detach().view(2, 5, 2, HEADS, 3)
    out = module(x)
    for b in range(2):
        for h in range(HEADS):
            for i in range(5):
                for j in range(5):
                    q = both[b, i, 0, h]
                    gates = [0.7 * logsigmoid(q @ both[b, t, 1, h] / math.sqrt(3)) for t in range(j, i)]
                    assert float(out[b, h, i, j].detach()) == pytest.approx(sum(gates), abs=1e-5)


def visible(bias: Tensor, kind: str) -> Tensor:
    """What causality lets through."""
    i, j = bias.shape[-2:]
    return bias if kind == 'both' else bias.tril(j - i)


@pytest.mark.parametrize('kind', ['causal', 'row'])
def test_in_steps_with_a_cache(kind: str) -> None:
    module, x = build(kind), torch.randn(2, 9, 4)
    whole = module(x)
    past, seen = LayerCache(), 0
    for step in (3, 1, 4, 1):
        bias = module.bias(x[:, seen : seen + step], past=past)
        seen += step
        out = bias.render(ScoreShape(queries=step, keys=seen + 2, front=2))
        assert (out[..., :2] == 0).all()
        torch.testing.assert_close(visible(out[..., 2:], kind), visible(whole[..., seen - step : seen, :seen], kind))


@pytest.mark.parametrize('kind', ['causal', 'both', 'row'])
def test_behind_memories(kind: str) -> None:
    module, x = build(kind), torch.randn(2, 9, 4)
    whole = module(x)
    bias = module.bias(x[:, 4:], mem=x[:, :4])
    torch.testing.assert_close(visible(bias.render(ScoreShape(5, 9)), kind), visible(whole[..., 4:, :], kind))
    rows = module.bias(x[:, 4:], mem=x[:, :4]).between(ScoreShape(5, 9), 1, 3)
    torch.testing.assert_close(rows, bias.render(ScoreShape(5, 9))[..., 1:3, :])


@pytest.mark.parametrize('kind', ['causal', 'row'])
def test_cache_behind_memories(kind: str) -> None:
    module, x = build(kind), torch.randn(2, 9, 4)
    whole = module(x)
    past, seen = LayerCache(), 4
    for step in (2, 1, 2):
        bias = module.bias(x[:, seen : seen + step], past=past, mem=x[:, :4])
        seen += step
        out = bias.render(ScoreShape(step, seen))
        torch.testing.assert_close(visible(out, kind), visible(whole[..., seen - step : seen, :seen], kind))


@pytest.mark.parametrize('kind', ['causal', 'both', 'row'])
def test_views_gradients_and_precision(kind: str) -> None:
    module, x = build(kind), torch.randn(3, 2, 5, 4)
    geometry = ScoreShape(5, 5)
    torch.testing.assert_close(module.bias(x).render(geometry), module(x[0]))
    module(x[0]).tril().sum().backward()
    assert (module.to_forget_gates[0].weight.grad[0] != 0).any()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = module(x[0])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, module(x[0]), atol=0.05, rtol=0.05)


def test_names_and_refusal() -> None:
    assert list(build('causal').state_dict()) == ['to_forget_gates.0.weight', 'to_forget_gates.0.bias']
    assert build('both').to_forget_gates[0].weight.shape == (2 * HEADS, 4)
    assert {k: tuple(v.shape) for k, v in build('row').state_dict().items()} == {'to_forget_gates.0.weight': (2 * HEADS * 3, 4)}
    with pytest.raises(FlagError, match='look back only'):
        PerRowDataDependentAlibi(4, HEADS, causal=False)
    with torch.device('meta'):
        empty = DataDependentAlibi(4, HEADS)
    empty.to_empty(device='cpu')
    empty.reset_parameters()
    assert (empty.to_forget_gates[0].bias == 5.0).all()
