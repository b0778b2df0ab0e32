"""Initial values belong to names: an idea changes those that it must."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from x_transformers.evidence.execute import prepared_model
from x_transformers.evidence.pairing import fill_by_name
from x_transformers.evidence.tasks import make_task

BASE: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8}


def values(seed: int = 0, **flags: Any) -> dict[str, torch.Tensor]:
    task = make_task('mqar', {'vocabulary': 32, 'length': 16, 'pairs': 2})
    return dict(prepared_model(task, {**BASE, **flags}, seed, 'cpu').named_parameters())


def test_the_same_seed_gives_the_same_values_and_another_one_others() -> None:
    first, second, other = values(), values(), values(seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].ndim == 2]
    assert len(drawn) > 8
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_what_an_idea_does_not_name_keeps_its_values() -> None:
    base = values()
    for idea in (
        {'attn_qk_norm': True, 'attn_qk_norm_dim_scale': True},
        {'attn_num_mem_kv': 3},
        {'attn_gate_values': True},
        {'num_memory_tokens': 2},
        {'num_residual_streams': 2},
        {'integrate_layers': True},
        {'rel_pos_bias': True},
    ):
        arm = values(**idea)
        shared = [name for name in base if name in arm and arm[name].shape == base[name].shape]
        assert len(shared) > 15, idea
        assert all(torch.equal(base[name], arm[name]) for name in shared), idea


def test_names_of_equal_shape_differ() -> None:
    first = values()
    weights = [name for name in first if name.endswith('to_q.weight')]
    assert len(weights) == 2
    assert not torch.equal(first[weights[0]], first[weights[1]])


def test_values_have_the_distribution_of_the_constructor() -> None:
    task = make_task('mqar', {})
    torch.manual_seed(0)
    plain = task.model({'dim': 64, 'depth': 2})
    before = {name: (p.detach().mean(), p.detach().std()) for name, p in plain.named_parameters() if p.numel() > 1000}
    fill_by_name(plain, 5)
    for name, p in plain.named_parameters():
        if name in before:
            assert torch.allclose(p.std(), before[name][1], rtol=0.1, atol=1e-6), name
            assert float((p.mean() - before[name][0]).detach().abs()) < 0.05 * float(before[name][1]) + 1e-6, name


def test_constants_stay_and_the_global_generator_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GRU(4, 4))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fill_by_name(net, 0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(net[1].weight, torch.ones(4))
    again = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GRU(4, 4))
    fill_by_name(again, 0)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_module_that_cannot_fill_itself_keeps_its_values() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 7.0))
            self.map = nn.Linear(3, 3)

    own = Own()
    before = own.map.weight.clone()
    fill_by_name(own, 0)
    assert own.scale.tolist() == [7.0] * 3
    assert not torch.equal(own.map.weight, before)
