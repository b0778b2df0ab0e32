"""What is planned is what tensors that have numbers take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.two_processes import free_port, join_as
from x_transformers.cli.main import main
from x_transformers.distributed.context import Sliced
from x_transformers.distributed.costs import RowGroup
from x_transformers.distributed.mesh import Degrees, MeshError, start, stop
from x_transformers.distributed.parallelize import checkpoint_layers
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
    group = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(2))
    model = build_model(FLAGS)
    assert group.parameters == size.parameters
    # matrices of layers are halved
    halved = sum(p.numel() for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2)
    assert size.parameters - 0.51 * halved < group.own <= size.parameters - halved / 2
    assert group.kept < size.kept
    assert group.flops == size.flops
    assert size.flops / 2 < group.own_flops < size.flops
    less = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(2, sequence_parallel=True, loss_parallel=True))
    assert less.kept < group.kept
    assert less.own == group.own - 256 * 32 / 2
    names = [need.name for need in needs(group, devices=4, per_node=4, batch=2) if not need.checkpointing]
    assert names == ['parts over all (--shard full)']
    assert not torch.distributed.is_initialized()


def kept_here(rank: int, port: int, path: Path) -> None:
    """What each of two processes keeps of a row of which it has a slice, and what that takes again."""
    join_as(rank, port)
    world = start(Degrees(context=2), 'cpu')
    found = []
    for checkpoint in ('none', 'full'):
        model = build_model(FLAGS).train()
        if checkpoint == 'full':
            checkpoint_layers(model, checkpoint)
        forward = Sliced(model, world.context_mesh)
        kept: dict[int, Tensor] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: Tensor, kept: Any = kept, own: Any = own) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward(torch.zeros(1, 64, dtype=torch.long))
        assert loss.isfinite()
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    everywhere: list[Any] = [None, None]
    torch.distributed.all_gather_object(everywhere, found)
    if rank == 0:
        path.write_text(json.dumps(everywhere), encoding='utf-8')
    stop()


@pytest.mark.slow
def test_slices_keep_what_is_planned(size: Size, tmp_path: Path) -> None:
    sliced = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(context=2))
    path = tmp_path / 'found'
    torch.multiprocessing.spawn(kept_here, (free_port(), path), nprocs=2)  # type: ignore[no-untyped-call]
    first, last = json.loads(path.read_text(encoding='utf-8'))
    # the plan is that of the last slice, which sees the keys of all
    assert first[0] <= last[0]
    assert sliced.kept == pytest.approx(last[0], rel=0.01)
    assert last[1] < sliced.kept_less < 2 * last[1]
    # half of the row, and the keys and values of the other half
    assert size.kept / 2 < sliced.kept < size.kept
    assert not torch.distributed.is_initialized()


def test_slices_share_parameters_where_they_lie_in_parts(size: Size) -> None:
    sliced = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(context=2))
    assert (sliced.parameters, sliced.own, sliced.flops) == (size.parameters, size.own, size.flops)
    # all scores are counted, also those that causality hides: the last slice has its share of them
    assert sliced.own_flops == size.flops / 2
    found = [need for need in needs(sliced, devices=8, per_node=4, batch=8) if not need.checkpointing]
    assert [(need.degrees, need.weights * 8 / (4 * size.parameters)) for need in found] == [
        (Degrees(replicate=4, context=2), 8),
        (Degrees(replicate=2, shard=2, context=2), 2),
        (Degrees(shard=4, context=2), 1),
    ]
    # two rows for each group
    assert found[0].activations == 2 * sliced.kept
    with pytest.raises(MeshError, match=r'--gpus must be a multiple of --tensor times --context times --pipeline \(2\), got 3'):
        list(needs(sliced, devices=3, per_node=4, batch=8))


def test_heads_of_slices_are_planned_in_parts() -> None:
    both = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(tensor=2, context=2))
    heads = Size.of(FLAGS, seq_len=64, half=False, group=RowGroup(tensor=2))
    assert both.own == heads.own
    assert heads.kept / 2 < both.kept < heads.kept
    found = [need for need in needs(both, devices=4, per_node=4, batch=1) if not need.checkpointing]
    assert [(need.degrees, need.weights) for need in found] == [(Degrees(tensor=2, context=2), 2 * both.own)]


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ({'group': RowGroup(3)}, 'number of heads must be a multiple of --tensor 3, got 2'),
        ({'pipeline': 4}, '--pipeline must be at most 3, the number of blocks of layers, got 4'),
        ({'pipeline': 2, 'group': RowGroup(2)}, '--tensor must be 1 with --pipeline'),
        ({'pipeline': 2, 'group': RowGroup(context=2)}, '--context must be 1 with --pipeline'),
        ({'group': RowGroup(1, sequence_parallel=True)}, '--sequence-parallel must go with --tensor 2 or more'),
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
    assert '--gpus must be a multiple of --tensor times --context times --pipeline (3), got 4' in capsys.readouterr().err


def test_the_command_plans_slices(capsys: pytest.CaptureFixture[str]) -> None:
    given = ['plan', '--dim', '256', '--depth', '8', '--heads', '2', '--attn-dim-head', '32', '--seq-len', '64', '--gpus', '2']
    # copies of all parameters take more than that, parts of them less
    assert main([*given, '--context', '2', '--memory', '0.08']) == 0
    out = capsys.readouterr().out
    assert '--context 2: the busiest device of a group does 1 times its share' in out
    assert 'first that fits into 0.08 GiB: parts over all (--shard full)' in out


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
