"""Relative projected bias against its formula, number by number."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Attention, Decoder
from x_transformers.attention.geometry import ScoreShape
from x_transformers.position.projected import RelativeProjectedBias


@pytest.mark.parametrize('geometry', [ScoreShape(5, 5), ScoreShape(2, 7), ScoreShape(1, 9, 2), ScoreShape(3, 8, 1)])
def test_formula(geometry: ScoreShape) -> None:
    torch.manual_seed(0)
    module, heads, bases, reach = RelativeProjectedBias(6, 2, 3, 4), 2, 3, 4
    x = torch.randn(2, geometry.queries, 6)
    linear, bank = module.to_distance_weights[0], module.distance_bank
    found = module.bias(x).render(geometry)
    assert found.shape == (2, heads, geometry.queries, geometry.keys)
    for b in range(2):
        for i in range(geometry.queries):
            weights = (linear.weight @ x[b, i] + linear.bias).view(heads, bases)
            for h in range(heads):
                for j in range(geometry.keys):
                    distance = geometry.first + i - (j - geometry.front)
                    inside = j >= geometry.front and 0 <= distance < reach
                    wanted = sum(weights[h, k] * bank[k, distance] for k in range(bases)) if inside else torch.zeros(())
                    torch.testing.assert_close(found[b, h, i, j], wanted)


def test_state_and_start() -> None:
    attn = Attention(8, heads=2, use_rel_proj_pos_bias=True, rel_proj_num_distance_basis=3, rel_proj_max_dist=500)
    state = {name: tuple(t.shape) for name, t in attn.rel_proj_pos_bias.state_dict().items()}
    assert state == {
        'distance_bank': (3, 500),
        'to_distance_weights.0.weight': (6, 8),
        'to_distance_weights.0.bias': (6,),
    }
    assert attn.rel_proj_pos_bias.distance_bank.std().item() == pytest.approx(0.02, rel=0.1)


def test_it_goes_with_memory_keys_latent_queries_and_another_bias() -> None:
    torch.manual_seed(0)
    flags = {'attn_use_rel_proj_pos_bias': True, 'attn_rel_proj_max_dist': 8, 'attn_num_mem_kv': 2, 'alibi_pos_bias': True}
    net = Decoder(dim=16, depth=1, heads=2, attn_use_latent_q=True, attn_dim_latent_q=6, **flags)
    x = torch.randn(2, 6, 16)
    out = net(x)
    attn = net.layers[0][1]
    with torch.no_grad():
        attn.rel_proj_pos_bias.distance_bank.zero_()
    alone = net(x)
    assert not torch.allclose(out, alone)
    attn.rel_proj_pos_bias = None
    torch.testing.assert_close(net(x), alone)
