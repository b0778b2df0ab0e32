"""Multiway dynamic dense connections, https://arxiv.org/abs/2502.12170, block by block and token by token."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError

SMALL = {'dim': 8, 'depth': 3, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mixed(made, hiddens, ways):
    newest = hiddens[-1]
    out = torch.zeros(ways, *newest.shape, dtype=newest.dtype)
    for row in range(2):
        for token in range(5):
            x = newest[row, token]
            inner = gelu(made.to_weights[0].weight @ (x / x.square().mean().sqrt()))
            weights = (made.mix.weight @ inner).view(ways, len(hiddens)) + made.static
            for way in range(ways):
                for weight, hidden in zip(weights[way], hiddens, strict=True):
                    out[way, row, token] += weight * hidden[row, token]
    return out


@pytest.mark.parametrize('kind', [Decoder, Encoder])
@pytest.mark.parametrize('crossed', [False, True])
def test_blocks_read_mixtures_of_all_before_them(kind, crossed):
    stack = shaken(kind(**SMALL, mudd=True, cross_attend=crossed), 0).double().eval()
    given = {'context': X.flip(1)} if crossed else {}
    size, hiddens, x, views = 2 + crossed, [X], X, None
    for block in range(3):
        for at in range(block * size, (block + 1) * size):
            layer, kind_of = stack.layers[at], stack.plan.kinds[at]
            h = views if kind_of == 'a' and views is not None else x
            x = x + layer.branch(layer.norms[0](h), **(given if kind_of == 'c' else {}))
        hiddens.append(x)
        ways = mixed(stack.mudd[block], hiddens, 4 if block < 2 else 1)
        views, x = ways[:3], ways[-1]
    out, record = stack(X, return_hiddens=True, **given)
    assert torch.allclose(out, stack.final_norm(x))
    assert len(record.hiddens) == 3


def test_at_the_start_blocks_follow_each_other():
    torch.manual_seed(0)
    stack = Decoder(**SMALL, mudd=True)
    plain = Decoder(**SMALL)
    plain.load_state_dict(stack.state_dict(), strict=False)
    assert torch.allclose(stack(X.float()), plain(X.float()), atol=1e-6)
    assert [made.static.shape for made in stack.mudd] == [(4, 2), (4, 3), (1, 4)]


@pytest.mark.parametrize(
    'flags',
    [{'macaron': True}, {'weight_tie_layers': True}, {'custom_layers': ('a', 'f'), 'depth': None}, {'sandwich_coef': 1}],
)
def test_other_layouts_are_refused(flags):
    with pytest.raises(FlagError, match='between blocks that begin with self attention'):
        Decoder(**SMALL | {'mudd': True} | flags)


@pytest.mark.parametrize(
    'flags', [{'unet_skips': True}, {'integrate_layers': True}, {'embed_lambdas': True}, {'resi_dual': True}]
)
def test_other_mixtures_are_refused(flags):
    with pytest.raises(FlagError, match='each decides what enters a layer'):
        Decoder(**SMALL, mudd=True, **flags)


def test_calls_run_all_blocks_in_their_order():
    stack = Decoder(**SMALL, mudd=True)
    for said in ({'layers_execute_order': (0, 1)}, {'repeat_blocks': (0, 2)}):
        with pytest.raises(ValueError, match='must be left out with mudd'):
            stack(X.float(), **said)
    with pytest.raises(FlagError, match='a memory is one state'):
        TransformerWrapper(num_tokens=7, max_seq_len=8, attn_layers=stack, max_mem_len=4)
