"""The feed-forward branch against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import InertFlagWarning
from x_transformers.attention.inputs import BranchInputs
from x_transformers.feedforward import GLU, FeedForward, ReluSquared, SoLU
from x_transformers.flags.feedforward import FeedForwardFlags


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def solu(x: Tensor) -> Tensor:
    mixed = x.softmax(-1) * x
    centred = mixed - mixed.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


ACTIVATIONS = {
    '': gelu,
    'swish': lambda x: x * x.sigmoid(),
    'relu_squared': lambda x: x.clamp(min=0) ** 2,
    'solu': solu,
}


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('glu', [False, True])
def test_activations(name: str, glu: bool) -> None:
    flags = {name: True} if name else {}
    ff = FeedForward(4, mult=1.6, glu=glu, **flags)
    x = torch.randn(2, 3, 4)
    activation = ACTIVATIONS[name]
    state = ff.state_dict()
    inner = 6
    if glu:
        both = x @ state['ff.0.proj.weight'].t() + state['ff.0.proj.bias']
        hidden = both[..., :inner] * activation(both[..., inner:])
    else:
        hidden = activation(x @ state['ff.0.0.weight'].t() + state['ff.0.0.bias'])
    torch.testing.assert_close(ff(x), hidden @ state['ff.2.weight'].t() + state['ff.2.bias'])


def test_names_of_parameters() -> None:
    plain = {'ff.0.0.weight': (8, 4), 'ff.0.0.bias': (8,), 'ff.2.weight': (4, 8), 'ff.2.bias': (4,)}
    assert shapes(FeedForward(4, mult=2)) == plain
    assert list(shapes(FeedForward(4, mult=2, dropout=0.1, sublayer_dropout=0.1))) == list(plain)
    assert shapes(FeedForward(4, 5, mult=2, no_bias=True)) == {'ff.0.0.weight': (8, 4), 'ff.2.weight': (5, 8)}
    # the gated projection keeps its bias, as in the original's checkpoints
    gated = FeedForward(4, mult=2, glu=True, glu_mult_bias=True, solu=True, no_bias=True, post_act_ln=True)
    assert shapes(gated) == {
        'ff.0.mult_bias': (8,),
        'ff.0.act.norm.gamma': (8,),
        'ff.0.proj.weight': (16, 4),
        'ff.0.proj.bias': (16,),
        'ff.1.gamma': (8,),
        'ff.3.weight': (4, 8),
    }
    assert 'ff.0.1.norm.gamma' in shapes(FeedForward(4, solu=True))


def test_norm_and_factor_between_the_maps() -> None:
    ff = FeedForward(4, mult=2, glu=True, glu_mult_bias=True, post_act_ln=True)
    state = ff.state_dict()
    assert (state['ff.0.mult_bias'] == 1).all()
    with torch.no_grad():
        ff.ff[0].mult_bias.normal_()
        ff.ff[1].gamma.normal_()
    x = torch.randn(2, 3, 4)
    value, gate = (x @ state['ff.0.proj.weight'].t() + state['ff.0.proj.bias']).split(8, dim=-1)
    hidden = F.layer_norm(value * gelu(gate) * state['ff.0.mult_bias'], (8,)) * state['ff.1.gamma']
    torch.testing.assert_close(ff(x), hidden @ state['ff.3.weight'].t() + state['ff.3.bias'])


def test_dropouts_fall_where_they_should() -> None:
    ff = FeedForward(4, mult=8, dropout=0.5, sublayer_dropout=0.5)
    x = torch.randn(2, 50, 4)
    kept = (ff(x) != 0).float().mean()
    assert 0.3 < kept < 0.7
    within = FeedForward(4, mult=8, dropout=0.999999, no_bias=True)
    assert (within(x) == 0).all()
    within.eval()
    assert (within(x) != 0).any()


def test_starts_silent_on_request() -> None:
    ff = FeedForward(4, zero_init_output=True)
    assert (ff(torch.randn(2, 3, 4)) == 0).all()
    with torch.no_grad():
        ff.ff[2].weight.normal_()
    ff.reset_parameters()
    assert (ff.ff[2].weight == 0).all()


def test_custom_activation_is_copied() -> None:
    activation = nn.PReLU()
    one, two = FeedForward(4, custom_activation=activation), FeedForward(4, glu=True, custom_activation=activation)
    assert 'ff.0.1.weight' in shapes(one)
    assert 'ff.0.act.weight' in shapes(two)
    assert one.ff[0][1] is not activation
    assert one.ff[0][1].weight is not two.ff[0].act.weight
    function = FeedForward(4, custom_activation=torch.sin)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(function(x), function.ff[2](torch.sin(function.ff[0][0](x))))


def test_deep_embed() -> None:
    ff = FeedForward(4)
    x, deep = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(ff(x, deep_embed=deep), ff(x) * deep)
    torch.testing.assert_close(ff(x, around=BranchInputs(deep_embed=deep)), ff(x) * deep)


def test_from_flags_and_muon() -> None:
    flags = FeedForwardFlags.parse({'glu': True, 'mult': 2, 'post_act_ln': True}, where='test')
    ff = FeedForward.from_flags(4, flags)
    assert [tuple(p.shape) for p in ff.muon_parameters()] == [(16, 4), (4, 8)]
    assert ff.muon_parameters()[0] is ff.ff[0].proj.weight
    assert ff(torch.randn(3, 2, 5, 4)).shape == (3, 2, 5, 4)


def test_builds_without_memory() -> None:
    with torch.device('meta'):
        ff = FeedForward(4, glu=True, glu_mult_bias=True, post_act_ln=True, zero_init_output=True)
    ff.to_empty(device='cpu')
    ff.reset_parameters()
    assert (ff.ff[0].mult_bias == 1).all()
    assert (ff.ff[1].gamma == 1).all()
    assert (ff.ff[3].weight == 0).all()
    assert ff.ff[0].proj.weight.abs().max() <= 0.5


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r'must have 4 features in its last axis, got shape .*5\)'):
        FeedForward(4)(torch.randn(2, 3, 5))


def test_parts_alone() -> None:
    x = torch.randn(2, 4)
    torch.testing.assert_close(ReluSquared()(x), ACTIVATIONS['relu_squared'](x))
    torch.testing.assert_close(SoLU(4)(x), solu(x))
    assert shapes(GLU(4, 3, nn.SiLU())) == {'proj.weight': (6, 4), 'proj.bias': (6,)}


# pieces whose inner features (32, and 64 with a gate) are as many numbers as x has, 2 * 64 * 8; not below 8 tokens, whose
# features are as many as the weights that make them
@pytest.mark.parametrize(
    ('flags', 'tokens', 'pieces'),
    [({}, 64, [32] * 4), ({'glu': True, 'dim_out': 6}, 64, [16] * 8), ({}, 8, [8, 8]), ({}, 6, [8, 4]), ({}, 4, [])],
)
def test_without_gradient_tokens_are_taken_in_pieces(flags: dict[str, Any], tokens: int, pieces: list[int]) -> None:
    feedforward, x = FeedForward(8, **flags).eval(), torch.randn(2, tokens, 8)
    rows: list[int] = []
    inner, want = feedforward.ff.forward, feedforward(x)

    def watched(t: torch.Tensor) -> torch.Tensor:
        if t.ndim == 2:
            rows.append(t.shape[0])
        return inner(t)

    with torch.no_grad():
        feedforward.ff.forward = watched  # type: ignore[method-assign]
        torch.testing.assert_close(feedforward(x), want)
        assert rows == pieces
        # whoever listens hears all tokens at once
        heard: list[torch.Size] = []
        feedforward.ff[0].register_forward_hook(lambda module, given, out: heard.append(out.shape))
        torch.testing.assert_close(feedforward(x), want)
    assert [shape[:2] for shape in heard] == [(2, tokens)]


@pytest.mark.parametrize('swish', [False, True])
def test_both_factors_of_a_gated_unit_are_clamped(swish):
    """https://arxiv.org/abs/2607.24653, as a loop over the features."""
    torch.manual_seed(0)
    layer = FeedForward(
        4, glu=True, glu_softclamp=True, glu_gate_softclamp_value=0.5, glu_up_softclamp_value=0.8, swish=swish
    ).double()
    x = 3 * torch.randn(5, 4, dtype=torch.float64)
    projected = layer.ff[0].proj(x)
    wanted = torch.zeros(5, 16, dtype=torch.float64)
    for row in range(5):
        for feature in range(16):
            up, gate = projected[row, feature].item(), projected[row, 16 + feature].item()
            share = 1 / (1 + math.exp(-gate)) if swish else 0.5 * (1 + math.erf(gate / math.sqrt(2)))
            wanted[row, feature] = 0.8 * math.tanh(up / 0.8) * 0.5 * math.tanh(gate / 0.5) * share
    assert torch.allclose(layer.ff[0](x), wanted)


def test_the_input_of_the_activation_is_clamped():
    layer = FeedForward(4, softclamp_value=0.5).double()
    x = 3 * torch.randn(5, 4, dtype=torch.float64)
    inner = layer.ff[0][0](x)
    assert torch.allclose(layer(x), layer.ff[2](F.gelu(0.5 * torch.tanh(inner / 0.5))))


def test_a_gated_unit_has_no_single_input_to_clamp():
    with pytest.warns(InertFlagWarning, match='glu_softclamp'):
        layer = FeedForward(4, glu=True, softclamp_value=0.5)
    plain = FeedForward(4, glu=True)
    plain.load_state_dict(layer.state_dict())
    x = 3 * torch.randn(5, 4)
    assert torch.equal(layer(x), plain(x))


def test_containers_are_called_where_somebody_listens() -> None:
    """Their parts are called one by one only where nobody could tell the difference."""
    ff = FeedForward(16, dropout=0.5).eval()
    x = torch.randn(2, 3, 16)
    wanted, heard = ff(x), []
    handles = [part.register_forward_hook(lambda *_: heard.append(1)) for part in (ff.ff, ff.ff[0], ff.ff[1])]
    torch.testing.assert_close(ff(x), wanted, rtol=0, atol=0)
    assert len(heard) == 3
    for handle in handles:
        handle.remove()
    ff(x)
    assert len(heard) == 3
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    ff(x)
    everywhere.remove()
    assert {ff.ff, ff.ff[0], ff.ff[1]} <= set(heard[3:])
    ff.ff.forward = lambda x: x
    torch.testing.assert_close(ff(x), x, rtol=0, atol=0)
