from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from x_transformers.training.build import QUICKSTART, build_model
from x_transformers.training.errors import TrainingError
from x_transformers.training.optimizers import decays, lr_share, make_optimizers, matrices_of
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


def test_gains_and_tables_do_not_decay_whatever_their_shape():
    flags = {
        'attn_qk_norm': True, 'attn_qk_norm_dim_scale': True, 'attn_head_scale': True, 'ff_deep_embed': True,
        'num_memory_tokens': 1, 'attn_num_mem_kv': 2, 'tie_embedding': True, 'use_abs_pos_emb': True,
        'attn_pre_talking_heads': True, 'num_residual_streams': 2,
    }  # fmt: skip
    net = build_model(QUICKSTART | {'dim': 16, 'depth': 1, 'heads': 2, 'attn_kv_heads': None, 'max_seq_len': 8} | flags)
    decay = decays(net)
    assert len(decay) == len(list(net.parameters()))
    decayed = {name.split('.')[-2] for name, p in net.named_parameters() if decay[p]}
    assert decayed == {'to_q', 'to_k', 'to_v', 'to_out', 'proj', '2'}  # the last: the second linear map of the feed-forward


def test_linear_maps_of_other_modules_decay():
    net = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.GRU(4, 4), nn.Conv1d(3, 3, 2), nn.GroupNorm(1, 3)])

    class Experts(nn.Module):
        decayed_parameters = ('maps',)

        def __init__(self):
            super().__init__()
            self.maps, self.gains = nn.Parameter(torch.ones(3, 4, 4)), nn.Parameter(torch.ones(3, 4))

    net.append(Experts())
    decay = decays(net)
    assert {name for name, p in net.named_parameters() if decay[p]} == {
        '0.in_proj_weight', '0.out_proj.weight', '1.weight_ih_l0', '1.weight_hh_l0', '2.weight', '4.maps',
    }  # fmt: skip


def test_muon_gets_matrices_of_the_layers_only():
    net = build_model(QUICKSTART | {'dim': 32, 'depth': 1, 'max_seq_len': 16})
    named = {parameter: name for name, parameter in net.named_parameters()}
    found = [named[parameter] for parameter in matrices_of(net)]
    assert found
    assert all(name.startswith('net.attn_layers.layers.') for name in found)
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert matrices_of(plain) == [plain[1].weight, plain[1].bias]


def test_a_model_without_parameters_is_refused():
    with pytest.raises(TrainingError, match='must have a parameter that requires gradients'):
        make_optimizers(nn.Dropout(), TrainOptions())


def test_every_parameter_is_moved_by_exactly_one_optimizer():
    net = model()
    adamw, muon = make_optimizers(net, TrainOptions(), [net[2].weight, net[2].bias, net.frozen])
    assert [p is net[2].weight for group in muon.param_groups for p in group['params']] == [True]
    moved = [p for group in adamw.param_groups for p in group['params']]
    assert len(moved) == 4
    assert not any(p is net[2].weight or p is net.frozen for p in moved)
    [only] = make_optimizers(net, TrainOptions(optimizer='adamw', weight_decay=0.3), [net[2].weight])
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


def test_warm_up_stable_decay():
    options = TrainOptions(steps=100, warmup=10, schedule='wsd', decay_share=0.2, final_lr=0.1)
    shares = [lr_share(step, options) for step in range(100)]
    assert shares[9:80] == [1.0] * 71
    assert shares[80:] == pytest.approx([1 - 0.9 * (i + 1) / 20 for i in range(20)])
