"""Biases by distance against loops over queries and keys."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.flags.base import FlagError
from x_transformers.position.bias import DenseBias
from x_transformers.position.relative import (
    AlibiPositionalBias,
    DynamicPositionBias,
    RelativeBias,
    RelativePositionBias,
    along_diagonals,
)


def looped(i: int, j: int, heads: int, value: callable) -> Tensor:
    """value(head, query's index, key's index), queries right-aligned."""
    return torch.tensor([[[value(h, j - i + r, c) for c in range(j)] for r in range(i)] for h in range(heads)])


def modules() -> list[nn.Module]:
    return [
        RelativePositionBias(2.0, causal=True, num_buckets=8, max_distance=16, heads=3),
        RelativePositionBias(2.0, num_buckets=8, max_distance=16, heads=3),
        DynamicPositionBias(4, heads=3, depth=2),
        DynamicPositionBias(4, heads=3, depth=3, log_distance=True, norm=True),
        AlibiPositionalBias(2, total_heads=3),
    ]


def test_buckets() -> None:
    def buckets(causal: bool, distances: list[int]) -> list[int]:
        return RelativePositionBias(1.0, causal=causal).buckets(torch.tensor(distances)).tolist()

    back = [-200, -128, -127, -64, -33, -32, -16, -15, -1, 0, 5]
    assert buckets(True, back) == [31, 31, 31, 26, 21, 21, 16, 15, 1, 0, 0]
    both = [-200, -128, -64, -33, -32, -16, -15, -9, -8, -7, -1, 0, 1, 7, 8, 9, 16, 64, 128]
    assert buckets(False, both) == [15, 15, 14, 12, 12, 10, 9, 8, 8, 7, 1, 0, 1 + 16, 23, 24, 24, 26, 30, 31]


@pytest.mark.parametrize(('i', 'j'), [(4, 4), (2, 7), (1, 5)])
def test_against_loops(i: int, j: int) -> None:
    causal, both, dynamic, logarithmic, alibi = modules()
    for t5 in (causal, both):
        table = t5.relative_attention_bias.weight

        def of_table(h: int, q: int, k: int, t5: nn.Module = t5, table: Tensor = table) -> float:
            return 2.0 * float(table[int(t5.buckets(torch.tensor(k - q))), h].detach())

        torch.testing.assert_close(t5(i, j), looped(i, j, 3, of_table))
    torch.testing.assert_close(alibi(i, j), looped(i, j, 3, lambda h, q, k: -abs(q - k) * (0.0625, 1 / 256, 0.0)[h]))

    def of_network(h: int, q: int, k: int) -> float:
        hidden = torch.tensor([float(q - k)])
        for layer in dynamic.mlp:
            hidden = layer(hidden)
        return float(hidden[h].detach())

    torch.testing.assert_close(dynamic(i, j), looped(i, j, 3, of_network))

    def of_log_network(h: int, q: int, k: int) -> float:
        hidden = torch.tensor([math.copysign(math.log(abs(q - k) + 1), q - k)])
        for layer in logarithmic.mlp:
            hidden = layer(hidden)
        return float(hidden[h].detach())

    torch.testing.assert_close(logarithmic(i, j), looped(i, j, 3, of_log_network), atol=1e-5, rtol=1e-5)


def test_names_of_parameters() -> None:
    names = [list(module.state_dict()) for module in modules()]
    assert names[0] == ['relative_attention_bias.weight']
    assert names[2] == ['mlp.0.0.weight', 'mlp.0.0.bias', 'mlp.1.0.weight', 'mlp.1.0.bias', 'mlp.2.weight', 'mlp.2.bias']
    assert [n for n in names[3] if '.1.' in n[3:]][:1] == ['mlp.0.1.gamma']
    assert {'mlp.1.1.weight', 'mlp.1.1.bias', 'mlp.2.1.weight'} <= set(names[3])
    assert names[4] == []


def test_slopes() -> None:
    assert AlibiPositionalBias(4).slopes.flatten().tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert AlibiPositionalBias(6).slopes.flatten().tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    twelve = AlibiPositionalBias(12).slopes.flatten().tolist()
    assert twelve == pytest.approx([2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert AlibiPositionalBias(2, 3, slopes=[0.5, 0.1]).slopes.flatten().tolist() == pytest.approx([0.5, 0.1, 0.0])
    rows = AlibiPositionalBias(2, total_heads=4)(3, 5)
    assert rows[0].tolist() == [
        [-0.125, -0.0625, 0, -0.0625, -0.125],
        [-0.1875, -0.125, -0.0625, 0, -0.0625],
        [-0.25, -0.1875, -0.125, -0.0625, 0],
    ]
    assert (rows[2:] == 0).all()


def test_alibi_at_given_positions() -> None:
    alibi = AlibiPositionalBias(2)
    pos = torch.tensor([[3, 1, 4], [0, 0, 9]])
    one = alibi.forward_custom_pos(pos[0])
    expected = torch.tensor([[[-abs(int(a) - int(b)) * m for b in pos[0]] for a in pos[0]] for m in (1 / 16, 1 / 256)])
    torch.testing.assert_close(one, expected)
    batch = alibi.forward_custom_pos(pos)
    assert batch.shape == (2, 2, 3, 3)
    torch.testing.assert_close(batch[0], one)
    torch.testing.assert_close(alibi.forward_custom_pos(pos[0, :1], pos[0]), one[:, :1])


def test_adapted_to_a_call() -> None:
    for module in modules():
        bias = RelativeBias(module)
        geometry = ScoreShape(queries=3, keys=7, front=2)
        out = bias.render(geometry)
        assert out.shape == (1, 3, 3, 7)
        assert (out[..., :2] == 0).all()
        torch.testing.assert_close(out[0, ..., 2:], module(3, 5))
        assert bias.render(geometry) is out
        torch.testing.assert_close(RelativeBias(module).between(geometry, 1, 3), out[:, :, 1:3, 2:])


def test_given_positions() -> None:
    geometry = ScoreShape(queries=2, keys=4, front=1)
    pos = torch.tensor([7, 9, 20, 21])
    *others, alibi = modules()
    for module in others:
        bias = RelativeBias(module, positions=pos).render(geometry)
        for query, key in product(range(2), range(3)):
            distance = pos[1 + key] - pos[2 + query]
            torch.testing.assert_close(bias[0, :, query, 1 + key], module.of_distances(distance[None])[:, 0])
        torch.testing.assert_close(module.forward_custom_pos(torch.arange(4)), module(4, 4))
    out = RelativeBias(alibi, positions=pos).render(geometry)
    torch.testing.assert_close(out[0, ..., 1:], alibi.forward_custom_pos(pos[2:], pos[1:]))
    batched = RelativeBias(alibi, positions=torch.stack((pos, pos * 2))).render(geometry)
    assert batched.shape == (2, 3, 2, 4)
    torch.testing.assert_close(batched[:1], out)
    torch.testing.assert_close(batched[1:], out * 2)
    torch.testing.assert_close(RelativeBias(alibi, positions=pos).between(geometry, 1, 2), out[:, :, 1:2, 1:])
    with pytest.raises(ValueError, match='a position for each of the 5 keys, got 4'):
        RelativeBias(alibi, positions=pos).render(ScoreShape(2, 5))


def test_rendered_without_gradients_is_not_used_with_them() -> None:
    module = modules()[0]
    bias = RelativeBias(module)
    geometry = ScoreShape(2, 3)
    with torch.no_grad():
        assert not bias.render(geometry).requires_grad
    assert bias.render(geometry).requires_grad


def test_gradient_reaches_the_table() -> None:
    t5 = RelativePositionBias(1.0, causal=True, num_buckets=4, max_distance=8, heads=1)
    t5(3, 3).sum().backward()
    grad = t5.relative_attention_bias.weight.grad
    assert grad is not None
    # bucket 0: the diagonal and the future; 1: one step back; 2: two steps back
    assert grad.flatten().tolist() == [6.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize('front', [0, 2])
def test_dense(front: int) -> None:
    geometry = ScoreShape(queries=3, keys=4 + front, front=front)
    for shape in ((3, 4), (2, 3, 4), (5, 2, 3, 4), (5, 1, 1, 4)):
        given = torch.randn(shape)
        out = DenseBias(given).render(geometry)
        assert out.shape[-1] == 4 + front
        assert (out[..., :front] == 0).all()
        torch.testing.assert_close(out[..., front:].expand(5, 2, 3, 4), given.expand(5, 2, 3, 4))
    whole = torch.randn(3, 4 + front)
    torch.testing.assert_close(DenseBias(whole).render(geometry)[0, 0], whole)
    constant = DenseBias(torch.randn(2, 1, 1)).render(geometry)
    assert (constant[..., :front] == 0).all()
    assert (constant[..., front:] == constant[..., -1:]).all()
    single = DenseBias(torch.ones(1, 1)).render(ScoreShape(1, 1 + front, front))
    assert single.flatten().tolist() == [0.0] * front + [1.0]
    # while decoding only the last rows are asked for
    square = torch.randn(4, 4)
    torch.testing.assert_close(DenseBias(square).render(ScoreShape(1, 4))[0, 0], square[-1:])
    torch.testing.assert_close(DenseBias(square).between(ScoreShape(3, 4), 1, 3)[0, 0], square[2:])


def test_refusals() -> None:
    with pytest.raises(ValueError, match='got shape'):
        DenseBias(torch.randn(3))
    with pytest.raises(ValueError, match='must be for 3 queries and 5 keys, got 3 and 4'):
        DenseBias(torch.randn(3, 4)).render(ScoreShape(3, 5))
    with pytest.raises(ValueError, match='got 2 and 4'):
        DenseBias(torch.randn(2, 4)).render(ScoreShape(3, 4))
    with pytest.raises(FlagError, match='depth must be at least 1'):
        DynamicPositionBias(4, heads=2, depth=0)
    with pytest.raises(FlagError, match='in 1 to 2, all heads, got 3'):
        AlibiPositionalBias(3, total_heads=2)
    with pytest.raises(FlagError, match='each of 3 heads, got 1'):
        AlibiPositionalBias(3, slopes=[0.5])


def test_builds_without_memory() -> None:
    with torch.device('meta'):
        empty = modules()
    for module, fresh in zip(empty, modules(), strict=True):
        assert module(2, 3).shape == (3, 2, 3)
        module.to_empty(device='cpu')
        module.reset_parameters()
        assert module(2, 3).isfinite().all()
        if isinstance(module, AlibiPositionalBias):
            torch.testing.assert_close(module(2, 3), fresh(2, 3))
        assert module.double()(2, 3).dtype == torch.double


@pytest.mark.parametrize(('i', 'j'), [(1, 1), (1, 5), (4, 1), (3, 5), (5, 5), (6, 2)])
def test_compiled_diagonals_are_the_same(i: int, j: int) -> None:
    values = torch.randn(2, i + j - 1)
    want = torch.stack([torch.stack([values[:, c - r + i - 1] for c in range(j)], -1) for r in range(i)], -2)
    assert torch.equal(along_diagonals(values, i, j), want)
    compiled = torch.compile(along_diagonals, backend='eager', fullgraph=True)
    assert torch.equal(compiled(values, i, j), want)
