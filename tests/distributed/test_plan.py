"""What is planned is what tensors that have numbers take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers.cli.main import main
from x_transformers.distributed.costs import TensorGroup
from x_transformers.distributed.mesh import Degrees, MeshError
from x_transformers.distributed.plan import Size, needs
from x_transformers.distributed.stages import leave_elsewhere
from x_transformers.distributed.units import layers_of
from x_transformers.training.build import build_model

FLAGS: dict[str, Any] = {'dim': 32, 'depth': 3, 'heads': 2, 'attn_dim_head': 16, 'rotary_pos_emb': True, 'max_seq_len': 64}


@pytest.fixture(scope='module')
def size() -> Size:
    return Size.of(FLAGS, seq_len=64, half=False)


def test_a_model_is_counted(size: Size) -> None:
    model = build_model(FLAGS)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.layers == 6
    assert size.tokens == 63
    # two operations per weight and token forward, and twice that backward
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and 'token_emb' not in name)
    assert size.flops > 0.98 * 6 * matrices * size.tokens
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(torch.zeros(1, 64, dtype=torch.long))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert loss.isfinite()
    assert abs(size.kept - real) <= 0.1 * real
    assert size.kept_less < size.kept


def test_a_large_vocabulary_is_counted() -> None:
    large = Size.of(FLAGS, seq_len=64, vocabulary=40_000)
    small = Size.of(FLAGS, seq_len=64)
    more = large.parameters - small.parameters
    assert more == 2 * 32 * (40_000 - 256)
    # the loss reads one row more, which it leaves out
    assert large.flops - small.flops == pytest.approx(3 * more * (large.tokens + 1))


def test_parts_need_less(size: Size) -> None:
    found = {
        (need.name.split()[-1].rstrip(')'), need.checkpointing): need for need in needs(size, devices=16, per_node=8, batch=32)
    }
    assert found['none', False].weights == 4 * size.parameters
    assert found['hybrid', False].weights == 4 * size.parameters / 8
    assert found['full', False].optimizer == 8 * size.parameters / 16
    full = found['full', False]
    assert full.total == full.weights + full.optimizer + full.gathered + max(full.gradients, full.activations)
    assert found['none', False].total > found['none', False].gradients + found['none', False].activations
    assert found['full', True].activations < found['full', False].activations == 2 * size.kept
    with pytest.raises(MeshError, match='--batch must be a multiple of --gpus'):
        list(needs(size, devices=16, per_node=8, batch=8))


def test_stages_share_what_there_is(size: Size) -> None:
    staged = Size.of(FLAGS, seq_len=64, half=False, pipeline=2)
    assert sum(stage.kept for stage in staged.stages) == size.kept == staged.kept
    assert sum(stage.flops for stage in staged.stages) == pytest.approx(size.flops)
    for number, stage in enumerate(staged.stages):
        model: Any = build_model(FLAGS)
        leave_elsewhere(model, model.net, number, 2)
        assert stage.parameters == sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
        assert stage.borders == 64 * 32 * 4
    first, last = (
        need for need in needs(staged, devices=4, per_node=4, batch=4, micros=8, half=False) if not need.checkpointing
    )
    assert first.degrees == last.degrees == Degrees(replicate=2, pipeline=2)
    # two rows, of two micro-batches in the first stage, which waits for the second one
    assert (first.activations, last.activations) == (4 * staged.stages[0].kept, 2 * staged.stages[1].kept)
    assert last.total == 16 * staged.stages[1].parameters + last.activations + 2 * 8 * 64 * 32 * 4
    assert all(need.activations == staged.stages[need.stage or 0].kept for need in needs(staged, devices=2, per_node=2, batch=1)
               if not need.checkpointing)  # fmt: skip
    # the busiest works for one micro-batch more than there are
    assert staged.operations(2, 8) == 2 * 9 * max(stage.flops for stage in staged.stages)


def test_a_tensor_group_shares_what_there_is(size: Size) -> None:
    group = Size.of(FLAGS, seq_len=64, half=False, group=TensorGroup(2))
    model = build_model(FLAGS)
    assert group.parameters == size.parameters
    # matrices of layers are halved
    halved = sum(p.numel() for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2)
    assert size.parameters - 0.51 * halved < group.own <= size.parameters - halved / 2
    assert group.kept < size.kept
    assert group.flops == size.flops
    assert size.flops / 2 < group.own_flops < size.flops
    less = Size.of(FLAGS, seq_len=64, half=False, group=TensorGroup(2, sequence_parallel=True, loss_parallel=True))
    assert less.kept < group.kept
    assert less.own == group.own - 256 * 32 / 2
    names = [need.name for need in needs(group, devices=4, per_node=4, batch=2) if not need.checkpointing]
    assert names == ['parts over all (--shard full)']
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ({'group': TensorGroup(3)}, 'number of heads must be a multiple of --tensor 3, got 2'),
        ({'pipeline': 4}, '--pipeline must be at most 3, the number of blocks of layers, got 4'),
        ({'pipeline': 2, 'group': TensorGroup(2)}, '--tensor must be 1 with --pipeline'),
        ({'group': TensorGroup(1, sequence_parallel=True)}, '--sequence-parallel must go with --tensor 2 or more'),
    ],
)
def test_a_plan_refuses_what_training_does(given: dict[str, Any], said: str) -> None:
    with pytest.raises(MeshError, match=said):
        Size.of(FLAGS, seq_len=64, **given)


def test_the_command_plans_stages(capsys: pytest.CaptureFixture[str]) -> None:
    given = ['plan', '--dim', '32', '--depth', '4', '--heads', '2', '--attn-dim-head', '16', '--seq-len', '64', '--gpus', '4']
    assert main([*given, '--pipeline', '2', '--grad-accum', '3', '--peak-flops', '1e12']) == 0
    out = capsys.readouterr().out
    assert '% of a step (25.0 % if they had equal work)' in out
    assert 'first that fits into 80 GiB: all stages of --pipeline 2' in out
    assert main([*given, '--pipeline', '3']) == 2
    assert '--gpus must be a multiple of --tensor times --pipeline (3), got 4' in capsys.readouterr().err


def test_the_command_tells_which_grid_fits(capsys: pytest.CaptureFixture[str]) -> None:
    given = ['plan', '--dim', '32', '--depth', '2', '--heads', '2', '--attn-dim-head', '16', '--seq-len', '64', '--gpus', '4']
    assert main([*given, '--peak-flops', '1e12']) == 0
    out = capsys.readouterr().out
    assert 'first that fits into 80 GiB: copies' in out
    assert 'tokens per second, if 40 %' in out
    assert main([*given, '--memory', '1e-6']) == 0
    assert 'none of them fits' in capsys.readouterr().out
    assert main([*given, '--gpus', '0', '--mfu', '2']) == 2
    said = capsys.readouterr().err
    assert '--gpus must be at least 1' in said
    assert '--mfu must be above 0' in said
