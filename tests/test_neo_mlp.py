from __future__ import annotations

import math

import pytest
import torch

from tests.objectives import builds_on_meta, saved_and_loaded, shaken
from x_transformers import NeoMLP


def model(seed: int = 0) -> NeoMLP:
    torch.manual_seed(seed)
    made = NeoMLP(dim_in=3, dim_hidden=4, dim_out=2, dim_model=8, depth=1)
    shaken(made)
    return made


def test_formula() -> None:
    net, x = model(), torch.randn(2, 3)
    proj, mix = net.random_fourier[0].proj, net.random_fourier[1]
    rows = []
    for row in x:
        neurons = [
            mix.weight @ torch.cos(2 * math.pi * (proj.weight[:, 0] * value + proj.bias)) + mix.bias + net.input_embed[i]
            for i, value in enumerate(row)
        ]
        states = net.transformer(torch.stack([*neurons, *net.hidden_embed, *net.output_embed])[None])[0]
        rows.append([states[7 + k] @ net.to_output_weights[k] + net.to_output_bias[k] for k in range(2)])
    out, embeds = net(x, return_embeds=True)
    torch.testing.assert_close(out, torch.stack([torch.stack(row) for row in rows]))
    assert [tuple(t.shape) for t in embeds] == [(2, 3, 8), (2, 4, 8), (2, 2, 8)]


def test_neurons_are_told_apart_by_their_embedding_only() -> None:
    """The transformer has no positions: hidden neurons in another order change nothing."""
    net, x = model(), torch.randn(2, 3)
    before = net(x)
    with torch.no_grad():
        net.hidden_embed.copy_(net.hidden_embed.flip(0))
    torch.testing.assert_close(net(x), before)


def test_rows_alone_and_together() -> None:
    net, x = model(), torch.randn(3, 3)
    together = net(x)
    for row in range(3):
        torch.testing.assert_close(net(x[row]), together[row])
    out, embeds = net(x[0], return_embeds=True)
    assert out.shape == (2,)
    assert embeds[2].shape == (2, 8)


def test_frequencies_stay() -> None:
    net = model()
    net(torch.randn(2, 3)).sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without == {'random_fourier.0.proj.weight', 'random_fourier.0.proj.bias'}


def test_state() -> None:
    net = model()
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith('transformer.')}
    assert own == {
        'input_embed': (3, 8),
        'hidden_embed': (4, 8),
        'output_embed': (2, 8),
        'random_fourier.0.proj.weight': (8, 1),
        'random_fourier.0.proj.bias': (8,),
        'random_fourier.1.weight': (8, 8),
        'random_fourier.1.bias': (8,),
        'to_output_weights': (2, 8),
        'to_output_bias': (2,),
    }
    x = torch.randn(2, 3)
    torch.testing.assert_close(saved_and_loaded(net, model(seed=1))(x), net(x))


def test_start() -> None:
    """Standard deviations of 64 x 64 normal draws lie within 5 of their own deviations (1.1 % each)."""
    net = NeoMLP(dim_in=64, dim_hidden=64, dim_out=64, dim_model=64, depth=1)
    for embed in (net.input_embed, net.hidden_embed, net.output_embed):
        assert embed.std().item() == pytest.approx(0.02, rel=0.056)
    assert net.to_output_weights.std().item() == pytest.approx(1.0, rel=0.056)
    assert not net.to_output_bias.any()


def test_built_on_meta() -> None:
    builds_on_meta(model_without_shaking)


def model_without_shaking() -> NeoMLP:
    return NeoMLP(dim_in=3, dim_hidden=4, dim_out=2, dim_model=8, depth=1)


@pytest.mark.parametrize('x', [torch.randn(2, 4), torch.ones(3, dtype=torch.long), torch.randn(1, 2, 3)])
def test_bad_input_is_named(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match='x must be floating point'):
        model()(x)
    with pytest.raises(ValueError, match=r'dim_out=0.*at least 1'):
        NeoMLP(dim_in=3, dim_hidden=4, dim_out=0, dim_model=8, depth=1)
