"""Canon layers, https://arxiv.org/abs/2512.17351: each place against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import shaken
from x_transformers import Attention, Decoder, Encoder, FeedForward
from x_transformers.convolution import CausalConvolution
from x_transformers.flags.base import FlagError

SMALL = {'dim': 8, 'depth': 2, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def looped(x, weight):
    """``x_t + Σ_j w_j x_{t-j}``, j = 0 … 3, token by token."""
    out = x.clone()
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for lag in range(4):
                if token >= lag:
                    out[row, token] += weight[lag] * x[row, token - lag]
    return out


def test_the_convolution_is_the_loop():
    made = CausalConvolution(8, 'x').double()
    assert torch.allclose(made(X), looped(X, made.weight))
    views = torch.stack((X, X.flip(1)))
    assert torch.allclose(made(views)[1], looped(X.flip(1), made.weight))
    mask = torch.arange(6) != 2
    hidden = made(X, mask.expand(2, 6))
    assert torch.allclose(hidden[:, 3:], looped(X * mask[:, None], made.weight)[:, 3:])
    assert made(X[:, :2]).shape == (2, 2, 8)


@pytest.mark.parametrize('kind', [Decoder, Encoder])
@pytest.mark.parametrize('places', ['a', 'c', 'ac'])
def test_before_a_branch(kind, places):
    stack = shaken(kind(**SMALL, canon=places), 0).double().eval()
    x = X
    for layer, letter in zip(stack.layers, 'afaf', strict=True):
        h, branch = layer.norms[0](x), layer.branch
        if {'a': 'a', 'f': 'c'}[letter] in places:
            h, branch = looped(h, branch.convolution.weight), branch.fn
        x = x + branch(h)
    assert torch.allclose(stack(X), stack.final_norm(x))
    assert len([name for name in stack.state_dict() if 'convolution' in name]) == 2 * len(places)


def test_of_queries_keys_and_values():
    layer = shaken(Attention(8, heads=2, dim_head=4, kv_heads=1, causal=True, canon=True), 0).double().eval()
    _, seen = layer(X, return_intermediates=True)
    q, k, v = (
        looped(linear(X), layer.convolutions[name].weight).view(2, 6, -1, 4).transpose(1, 2)
        for name, linear in (('q', layer.to_q), ('k', layer.to_k), ('v', layer.to_v))
    )
    assert torch.allclose(seen.values, v)
    assert torch.allclose(seen.qk_similarities, q @ k.transpose(-1, -2) * 4**-0.5)


@pytest.mark.parametrize('glu', [False, True])
def test_inside_a_feed_forward(glu):
    layer = shaken(FeedForward(8, canon=True, glu=glu), 0).double().eval()
    first, last = layer.ff[0], layer.ff[2]
    if glu:
        value, gate = looped(first.proj(X), first.canon.weight).chunk(2, dim=-1)
        inner = value * torch.nn.functional.gelu(gate)
    else:
        inner = torch.nn.functional.gelu(looped(first[0](X), first.canon.weight))
    assert torch.allclose(layer(X), last(inner))
    with torch.no_grad():
        long = torch.randn(1, 1500, 8, dtype=torch.float64)
        assert torch.allclose(layer(long)[:, :700], layer(long[:, :700]))


def test_letters_choose_the_places():
    stack = Decoder(**SMALL, canon='bd')
    assert stack.flags.attention.canon
    assert stack.flags.feedforward.canon
    assert not Decoder(**SMALL, canon='ac').flags.attention.canon
    crossing = Decoder(**SMALL, canon='abcd', cross_attend=True)
    assert crossing.layers[0].inside.convolutions is not None
    assert crossing.layers[1].inside.convolutions is None


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'canon': 'ae'}, 'the places are'),
        ({'canon': 'a', 'attn_flash_pack_seq': True, 'rotary_pos_emb': True}, 'from one packed sequence'),
        ({'canon': 'b', 'attn_use_latent_kv': True, 'attn_dim_latent_kv': 4}, 'made of the latent'),
        ({'canon': 'd', 'ff_experts': 4}, 'reads single tokens'),
        ({'cross_attend': True, 'cross_attn_canon': True}, 'the order of one sequence'),
    ],
)
def test_what_does_not_fit_is_refused(flags, says):
    with pytest.raises(FlagError, match=says):
        Decoder(**SMALL | flags)


def test_a_context_and_a_cache_without_tokens_are_refused():
    with pytest.raises(ValueError, match='over one sequence'):
        Attention(8, canon=True)(X.float(), context=X.float())
    _, plain = Decoder(**SMALL)(X.float(), return_hiddens=True)
    with pytest.raises(ValueError, match='that canon convolves'):
        Decoder(**SMALL, canon='a')(X[:, :1].float(), cache=plain)
