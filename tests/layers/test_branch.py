from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from x_transformers.attention.inputs import BranchInputs
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.layers.branch import AdaptiveLayerScale, LayerScale, Scale, ShiftTokens, innermost, shift


class Echo(nn.Module):
    """A branch that gives back what it is given."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        return x, 'kept'


def shifted_by_loops(x: Tensor, shifts: list[int], mask: Tensor | None) -> Tensor:
    out = x.clone()
    width = x.shape[-1] // len(shifts)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for k, by in enumerate(shifts):
                if by == 0:
                    continue
                source, chunk = n - by, slice(k * width, (k + 1) * width)
                there = 0 <= source < x.shape[1] and (mask is None or bool(mask[b, source]))
                out[b, n, chunk] = x[b, source, chunk] if there else 0.0
    return out


@pytest.mark.parametrize('shifts', [[0, 1], [0, 1, 2], [-1, 0, 1], [-2, -1, 0, 1, 2]])
@pytest.mark.parametrize('masked', [False, True])
def test_shift_tokens(shifts: list[int], masked: bool) -> None:
    x = torch.randn(2, 5, 11)
    mask = torch.rand(2, 5) > 0.4 if masked else None
    wrapped = ShiftTokens(shifts, Echo())
    want = shifted_by_loops(x, shifts, mask)
    assert torch.equal(wrapped(x, mask=mask)[0], want)
    assert wrapped(x, mask=mask)[1] == 'kept'
    assert torch.equal(wrapped(x, around=BranchInputs(padding=mask))[0], want)


def test_shift_beyond_the_sequence() -> None:
    x = torch.randn(1, 2, 8)
    assert torch.equal(ShiftTokens(range(4), Echo())(x)[0], shifted_by_loops(x, [0, 1, 2, 3], None))


def test_shift_of_three_views() -> None:
    x = torch.randn(3, 2, 5, 6)
    mask = torch.rand(2, 5) > 0.4
    got = ShiftTokens([0, 1], Echo())(x, around=BranchInputs(padding=mask, past=LayerCache()))[0]
    for view in range(3):
        assert torch.equal(got[view], shifted_by_loops(x[view], [0, 1], mask))


@pytest.mark.parametrize('cuts', [[3, 4], [1, 1, 1, 1, 1, 1, 1], [7], [2, 1, 4]])
def test_shift_step_by_step(cuts: list[int]) -> None:
    x, mask = torch.randn(2, 7, 9), torch.rand(2, 7) > 0.3
    wrapped, past, outs = ShiftTokens([0, 1, 2], Echo()), LayerCache(), []
    for piece, seen in zip(x.split(cuts, dim=1), mask.split(cuts, dim=1), strict=True):
        outs.append(wrapped(piece, around=BranchInputs(padding=seen, past=past))[0])
    assert torch.equal(torch.cat(outs, dim=1), shifted_by_loops(x, [0, 1, 2], mask))


def test_shift_function() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    assert shift(x, 0) is x
    assert shift(x, 1)[0, :, 0].tolist() == [0, 0, 2]
    assert shift(x, -1)[0, :, 0].tolist() == [2, 4, 0]
    assert shift(x, 9).abs().sum() == 0
    assert shift(x, 1, torch.tensor([[True, False, True]]))[0, :, 1].tolist() == [0, 1, 0]


def test_scales() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(Scale(0.5, Echo())(x)[0], x * 0.5)
    assert torch.equal(LayerScale(Echo(), 4, init_value=0.3)(x)[0], x * 0.3)
    offset = LayerScale(Echo(), 4, init_value=0.25, unit_offset=True)
    assert torch.equal(offset.gamma, torch.full((4,), -0.75))
    assert torch.equal(offset(x, around=BranchInputs())[0], x * 0.25)


@pytest.mark.parametrize('per_token', [False, True])
def test_adaptive_layer_scale(per_token: bool) -> None:
    x, condition = torch.randn(2, 3, 4), torch.randn(2, 3, 5) if per_token else torch.randn(2, 5)
    scale = AdaptiveLayerScale(Echo(), 4, dim_condition=5)
    torch.testing.assert_close(scale(x, condition=condition)[0], x * torch.tensor(-2.0).sigmoid())
    nn.init.normal_(scale.to_gamma.weight)
    want = torch.empty_like(x)
    for b in range(2):
        for n in range(3):
            c = condition[b, n] if per_token else condition[b]
            want[b, n] = x[b, n] * (scale.to_gamma.weight @ c - 2.0).sigmoid()
    torch.testing.assert_close(scale(x, around=BranchInputs(condition=condition))[0], want)
    with pytest.raises(ValueError, match='condition'):
        scale(x)


def test_innermost() -> None:
    echo = Echo()
    assert innermost(LayerScale(ShiftTokens([0, 1], Scale(0.5, echo)), 4)) is echo
