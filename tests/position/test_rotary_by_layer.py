"""Rotary positions whose base or scaling differs between layers."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import shaken
from x_transformers import Decoder, TransformerWrapper
from x_transformers.position.rotary import RotaryEmbedding

SMALL = {'dim': 16, 'depth': 3, 'heads': 2, 'attn_dim_head': 8, 'verbose': False, 'rotary_pos_emb': True, 'rotary_emb_dim': 8}
LINEAR = {'type': 'linear', 'factor': 4.0}
DYNAMIC = {'type': 'dynamic', 'factor': 2.0, 'original_length': 4}
X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made(**flags):
    return shaken(Decoder(**SMALL | flags), 0).double().eval()


def test_each_layer_turns_by_its_own_frequencies():
    thetas, scalings = (100.0, 1e4, 100.0), (None, LINEAR, None)
    stack = made(rotary_theta=thetas, rotary_scaling=scalings)
    x = X
    for index, layer in enumerate(stack.layers):
        own = {}
        if index % 2 == 0:
            embedding = RotaryEmbedding(8, base=thetas[index // 2], scaling=scalings[index // 2]).double()
            own = {'rotary_pos_emb': embedding(torch.arange(7))}
        x = x + layer.branch(layer.norms[0](x), **own)
    assert torch.allclose(stack(X), stack.final_norm(x))


def test_layers_without_positions():
    """https://arxiv.org/abs/2501.18795: some layers turn their heads, others read none of the positions."""
    stack = made(rotate_num_heads=(None, 0, 1))
    embedding, x = RotaryEmbedding(8).double()(torch.arange(7)), X
    for index, layer in enumerate(stack.layers):
        own = {} if index % 2 or index == 2 else {'rotary_pos_emb': embedding}
        x = x + layer.branch(layer.norms[0](x), **own)
    assert torch.allclose(stack(X), stack.final_norm(x))
    net = TransformerWrapper(num_tokens=9, max_seq_len=12, attn_layers=Decoder(**SMALL, rotate_num_heads=(0, None)))
    net = shaken(net, 0).double().eval()
    ids = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = None
    for at in range(8):
        logits, cache = net(ids[:, : at + 1], cache=cache, return_intermediates=True)
        assert torch.allclose(logits[:, -1], net(ids[:, : at + 1])[:, -1])
        held = cache.attn_intermediates[0].cached_kv[0]
        assert torch.allclose(held, net(ids[:, : at + 1], return_intermediates=True)[1].attn_intermediates[0].cached_kv[0])


def test_no_head_that_turns_is_told():
    with pytest.warns(UserWarning, match='no head turns, so that rotary positions do nothing'):
        Decoder(**SMALL, rotate_num_heads=0)


def test_one_embedding_for_each_distinct_value():
    assert made(rotary_theta=(100.0, 1e4, 100.0)).rotary_of_layer == (0, 0, 1, 0, 0, 0)
    one, same = made(rotary_theta=100.0), made(rotary_theta=(100.0, 100.0, 100.0))
    same.load_state_dict(one.state_dict())
    assert torch.equal(one(X), same(X))
    assert set(one.state_dict()) == {key for key in made(rotary_theta=(100.0, 10.0)).state_dict() if 'other' not in key}


# what depends on the length is decoded exactly in the last layer only: in others earlier tokens would see it, too
@pytest.mark.parametrize('scaling', [None, (LINEAR, None, DYNAMIC)])
def test_tokens_are_decoded_one_by_one(scaling):
    layers = Decoder(**SMALL, rotary_theta=(100.0, 1e4), rotary_scaling=scaling)
    net = shaken(TransformerWrapper(num_tokens=9, max_seq_len=12, attn_layers=layers), 0).double().eval()
    ids = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = None
    for at in range(8):
        logits, cache = net(ids[:, : at + 1], cache=cache, return_intermediates=True)
        assert torch.allclose(logits[:, -1], net(ids[:, : at + 1])[:, -1])


def test_a_context_with_positions_is_turned_alike():
    stack = made(cross_attend=True, rotary_theta=(100.0, 1e4, 100.0))
    context, places = X[:, :5], torch.arange(5)
    x = X
    for index, (layer, kind) in enumerate(zip(stack.layers, stack.plan.kinds, strict=True)):
        embedding = RotaryEmbedding(8, base=(100.0, 1e4, 100.0)[index // 3]).double()
        own = {'rotary_pos_emb': embedding(torch.arange(7))} if kind != 'f' else {}
        more = {'context': context, 'context_rotary_pos_emb': embedding(places)} if kind == 'c' else {}
        x = x + layer.branch(layer.norms[0](x), **own, **more)
    assert torch.allclose(stack(X, context=context, context_pos=places), stack.final_norm(x))
