"""Learned factors of the stream and of the stack's input, before each layer."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder
from x_transformers.flags.base import FlagError

SMALL = {'dim': 8, 'depth': 2, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rms(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize('names', [('residual_lambdas',), ('embed_lambdas',), ('residual_lambdas', 'embed_lambdas')])
@pytest.mark.parametrize('kind', [Decoder, Encoder])
def test_the_stream_that_enters_a_layer_is_the_formula(names, kind):
    stack = shaken(kind(**SMALL, **dict.fromkeys(names, True)), 0).double().eval()
    x, first = X, rms(X)
    for index, layer in enumerate(stack.layers):
        r = stack.lambdas.residual[index] if 'residual_lambdas' in names else 1.0
        embed = stack.lambdas.embed[index] if 'embed_lambdas' in names else 0.0
        x = r * x + embed * first
        x = x + layer.branch(layer.norms[0](x))
    assert torch.allclose(stack(X), stack.final_norm(x))


def test_each_stream_is_given_the_input():
    stack = shaken(Decoder(**SMALL, embed_lambdas=True, num_residual_streams=3), 0).double().eval()
    alone = shaken(Decoder(**SMALL, num_residual_streams=3), 0).double().eval()
    alone.load_state_dict({name: value for name, value in stack.state_dict().items() if not name.startswith('lambdas')})
    opened = alone.streams.open(X, alone.stream_emb)
    for index, layer in enumerate(alone.layers):
        opened = (opened.unflatten(0, (2, 3)) + stack.lambdas.embed[index] * rms(X).unsqueeze(1)).flatten(0, 1)
        h, rest = layer.residual.read(opened)
        opened = layer.residual(layer.branch(layer.norms[0](h)), rest)
    assert torch.allclose(stack(X), alone.streams.close(opened, alone.final_norm))


def test_at_the_start_they_change_nothing_and_may_start_elsewhere():
    torch.manual_seed(0)
    stack = Decoder(**SMALL, residual_lambdas=True, embed_lambdas=True)
    torch.manual_seed(0)
    assert torch.equal(stack(X.float()), Decoder(**SMALL)(X.float()))
    told = Decoder(**SMALL, residual_lambdas=(1.2, 1.0), embed_lambdas=lambda layer: 0.1 * layer)
    assert told.lambdas.residual.tolist() == pytest.approx([1.2, 1.0, 1.2, 1.0])
    assert told.lambdas.embed.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert Decoder(**SMALL, embed_lambdas=0.0).lambdas.embed.tolist() == [0.0] * 4


@pytest.mark.parametrize('other', ['resi_dual', 'parallel_block'])
def test_two_streams_are_refused(other):
    with pytest.raises(FlagError, match='no single stream that enters a layer'):
        Decoder(**SMALL, residual_lambdas=True, **{other: True})
