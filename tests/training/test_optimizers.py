from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from x_transformers.training.optimizers import decays, lr_share, make_optimizers
from x_transformers.training.options import TrainOptions


def model():
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    net.register_parameter('frozen', nn.Parameter(torch.ones(2, 2), requires_grad=False))
    return net


def test_vectors_and_embeddings_do_not_decay():
    net = model()
    named = dict(net.named_parameters())
    assert {name: decays(net).get(p) for name, p in named.items()} == {
        'frozen': None,
        '0.weight': False,
        '1.weight': False,
        '1.bias': False,
        '2.weight': True,
        '2.bias': False,
    }


def test_every_parameter_is_moved_by_exactly_one_optimizer():
    net = model()
    adamw, muon = make_optimizers(net, [net[2].weight, net[2].bias, net.frozen], TrainOptions())
    assert [p is net[2].weight for group in muon.param_groups for p in group['params']] == [True]
    moved = [p for group in adamw.param_groups for p in group['params']]
    assert len(moved) == 4
    assert not any(p is net[2].weight or p is net.frozen for p in moved)
    [only] = make_optimizers(net, [net[2].weight], TrainOptions(optimizer='adamw', weight_decay=0.3))
    assert [(group['weight_decay'], len(group['params'])) for group in only.param_groups] == [(0.3, 1), (0.0, 4)]


def test_warm_up_then_cosine():
    options = TrainOptions(steps=100, warmup=10, final_lr=0.1)
    assert [lr_share(step, options) for step in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert lr_share(99, options) == pytest.approx(0.1)
    assert lr_share(54, options) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    shares = [lr_share(step, options) for step in range(10, 100)]
    assert shares == sorted(shares, reverse=True)


def test_other_schedules():
    linear = TrainOptions(steps=20, warmup=0, schedule='linear', final_lr=0.0)
    assert [lr_share(step, linear) for step in range(20)] == pytest.approx([1 - (s + 1) / 20 for s in range(20)])
    constant = TrainOptions(steps=20, warmup=4, schedule='constant')
    assert [lr_share(step, constant) for step in (0, 3, 4, 19)] == [0.25, 1.0, 1.0, 1.0]
