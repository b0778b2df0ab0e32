from __future__ import annotations

import pytest
import torch
from torch import nn

from x_transformers.layers.across_depth import ConcatCombine, DynamicLIMe, injection


@pytest.mark.parametrize('views', [1, 3])
@pytest.mark.parametrize('softmax', [True, False])
def test_lime(views: int, softmax: bool) -> None:
    mix = DynamicLIMe(4, 3, num_views=views, use_softmax=softmax)
    hiddens = list(torch.randn(3, 2, 5, 4))
    x = hiddens[-1]
    got = mix(x, hiddens)
    norm, linear = mix.to_weights[0], mix.to_weights[1]
    for v in range(views):
        for b in range(2):
            for n in range(5):
                normed = x[b, n] / x[b, n].square().mean().sqrt() * norm.g
                scores = (linear.weight @ normed + linear.bias)[v * 3 : (v + 1) * 3]
                weights = scores.softmax(dim=0) if softmax else scores.relu()
                want = sum(weight * hidden[b, n] for weight, hidden in zip(weights, hiddens, strict=True))
                torch.testing.assert_close((got if views == 1 else got[v])[b, n], want)
    assert torch.equal(mix(x, torch.stack(hiddens)), got)


def test_lime_of_another_number_of_layers() -> None:
    with pytest.raises(ValueError, match='inputs of 3 layers, got 2'):
        DynamicLIMe(4, 3)(torch.randn(1, 2, 4), [torch.randn(1, 2, 4)] * 2)


def test_unet_skip() -> None:
    combine = ConcatCombine(4, 1)
    x, earlier = torch.randn(2, 3, 4), list(torch.randn(2, 2, 3, 4))
    want = earlier[1] @ combine.combine.weight[:, :4].T + x @ combine.combine.weight[:, 4:].T
    torch.testing.assert_close(combine(x, earlier), want)
    torch.testing.assert_close(combine(x, {1: earlier[1]}), want)


def test_injection() -> None:
    x, condition = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    proj, gate = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)
    assert injection(x, None, None, None) is None
    assert injection(x, condition, None, None) is condition
    torch.testing.assert_close(injection(x, None, proj, None), x @ proj.weight.T)
    torch.testing.assert_close(injection(x, condition, None, gate), condition * (x @ gate.weight.T).sigmoid())
