"""``python -m tests.distributed.equality [decoder+streams …] [--copies --shards …]``: several processes against one.

A flag that the table refuses for a mode must be refused by name; every other one must give the numbers of one process.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.staged import check_staged
from tests.laws.combination import Combination
from tests.two_processes import check_equal, command, objective_of
from x_transformers import AutoregressiveWrapper, autoregressive_wrapper
from x_transformers.distributed.context import MASK, PASSED, PER_TOKEN, Sliced, sliced_refusals
from x_transformers.distributed.mesh import Degrees, MeshError, World, start
from x_transformers.distributed.parallelize import parallelize
from x_transformers.distributed.refusals import refusals
from x_transformers.distributed.sequence import NEED_ALL, sequence_refusals
from x_transformers.distributed.stages import staged_refusals
from x_transformers.distributed.tensor import check_divides
from x_transformers.distributed.units import stacks_of
from x_transformers.distributed.vocabulary import vocabulary_refusals
from x_transformers.randomness import decide_alike

# (degrees, keywords of parallelize)
MODES: dict[str, tuple[Degrees, dict[str, Any]]] = {
    'copies': (Degrees(replicate=2), {}),
    'copies+objective': (Degrees(replicate=2), {}),
    'copies+full': (Degrees(replicate=2), {'checkpoint': 'full'}),
    'shards': (Degrees(shard=2), {'shard': 'full'}),
    'shards+full': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 'full'}),
    'shards+every': (Degrees(shard=2), {'shard': 'full', 'checkpoint': 2}),
    'shards+objective': (Degrees(shard=2), {'shard': 'full'}),
    'shards+kept': (Degrees(shard=2), {'shard': 'full', 'reshard': False}),
    'hybrid': (Degrees(replicate=2, shard=1), {'shard': 'hybrid'}),
    'tensor': (Degrees(tensor=2), {}),
    'tensor+full': (Degrees(tensor=2), {'checkpoint': 'full'}),
    'sequence': (Degrees(tensor=2), {'sequence_parallel': True}),
    'sequence+full': (Degrees(tensor=2), {'sequence_parallel': True, 'checkpoint': 'full'}),
    'logits': (Degrees(tensor=2), {'loss_parallel': True}),
    'loss': (Degrees(tensor=2), {'loss_parallel': True}),
    'context': (Degrees(context=2), {}),
    'context+full': (Degrees(context=2), {'shard': 'full', 'checkpoint': 'full'}),
    'pipeline': (Degrees(pipeline=2), {}),
    'pipeline+full': (Degrees(pipeline=2), {'checkpoint': 'full'}),
}
# the same for four processes
OF_FOUR: dict[str, tuple[Degrees, dict[str, Any]]] = {
    'shards+tensor': (Degrees(shard=2, tensor=2), {'shard': 'full'}),
    'shards+tensor+full': (Degrees(shard=2, tensor=2), {'shard': 'full', 'checkpoint': 'full'}),
    'hybrid+tensor': (Degrees(replicate=2, tensor=2), {'shard': 'hybrid'}),
    'shards+sequence': (Degrees(shard=2, tensor=2), {'shard': 'full', 'sequence_parallel': True}),
    'shards+loss': (Degrees(shard=2, tensor=2), {'shard': 'full', 'sequence_parallel': True, 'loss_parallel': True}),
    'shards+context': (Degrees(shard=2, context=2), {'shard': 'full'}),
    'tensor+context': (Degrees(tensor=2, context=2), {'shard': 'full'}),
    'stages': (Degrees(pipeline=4), {}),
    'copies+pipeline': (Degrees(replicate=2, pipeline=2), {}),
    'hybrid+shards': (Degrees(replicate=2, shard=2), {'shard': 'hybrid'}),
}
# arguments by which a call changes which layers run
OTHER_ORDERS = {'layers_execute_order', 'repeat_blocks'}


@cache
def world_of(degrees: Degrees) -> World:
    return start(degrees, 'cpu')


def attempt(name: str) -> None:
    case, mode = name.split()
    degrees, how = {**MODES, **OF_FOUR}[mode]
    combination, world = Combination.parse(case), world_of(degrees)
    objective = degrees.context > 1 or mode.endswith(('loss', 'objective'))

    stacks: list[Any] = []
    on_all_rows: list[bool] = []  # of each call of a stack, whether it is not to be cut

    def note(stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        on_all_rows.append(any(kwargs.get(name, False) not in (None, False) for name in NEED_ALL))

    def spread(model: nn.Module) -> InSlices | None:
        parallelize(model, world, **how)
        stacks.extend(stacks_of(model))
        for stack in stacks:
            stack.register_forward_pre_hook(note, with_kwargs=True)
        if degrees.tensor > 1:
            meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
            assert any('tensor' in (mesh.mesh_dim_names or ()) for mesh in meshes), 'nothing is cut'
        return InSlices(model, world.context_mesh) if degrees.context > 1 else None

    torch.manual_seed(0)
    deeper: dict[str, Any] = {'stack': {'depth': degrees.pipeline}} if degrees.pipeline > 2 else {}
    model: nn.Module = combination.build(**deeper)
    if degrees.pipeline > 1:
        attempt_stages(combination, model, world, how)
        return
    if objective:
        if not is_trainable(combination, model):
            return
        model = AutoregressiveWrapper(model)
    if any(said(model, degrees, how)):
        with pytest.raises(MeshError, match=' must '):
            parallelize(model, world, **how)
    elif degrees.context > 1 and combination.inputs(1).part().keys() - PASSED - PER_TOKEN - {MASK}:
        # whose call has something for each token
        with pytest.raises(MeshError, match='must be left out with --context'):
            objective_of(combination, spread(model), 0)  # type: ignore[arg-type]
    else:
        with every_loss_by_its_head(mode.endswith('loss')):
            check_equal(combination, spread, (world.data_rank, world.data_size), objective={} if objective else None)
        if how.get('sequence_parallel') and not (on_all_rows and all(on_all_rows)):
            assert any(stack.streams.slices.calls > 0 for stack in stacks), 'no sequence was cut'


@contextmanager
def every_loss_by_its_head(wanted: bool) -> Iterator[None]:
    """Without logits even where they would be few."""
    before = autoregressive_wrapper.LARGE_LOGITS
    autoregressive_wrapper.LARGE_LOGITS = 0 if wanted else before
    try:
        yield
    finally:
        autoregressive_wrapper.LARGE_LOGITS = before


def attempt_stages(case: Combination, net: nn.Module, world: World, how: dict[str, Any]) -> None:
    """A net by itself, and where it can be trained to predict the next token also that."""
    models = [net, AutoregressiveWrapper(copy.deepcopy(net))] if is_trainable(case, copy.deepcopy(net)) else [net]
    for model in models:
        if any(said(model, world.degrees, how)):
            with pytest.raises(MeshError, match=' must '):
                parallelize(model, world, **how)
        elif case.inputs(1).part().keys() & OTHER_ORDERS:
            with pytest.raises(ValueError, match='must be run in their own order'):
                check_staged(case, model, world, how)
        else:
            check_staged(case, model, world, how)


class InSlices(Sliced):
    """Gradients are averaged over slices, and the parts of a loss add up."""

    def __call__(self, x: Tensor, **given: Any) -> Tensor:
        return super().__call__(x, **given) * self.size

    def agreed(self, loss: Tensor) -> Tensor:
        whole = loss.detach() / self.size
        dist.all_reduce(whole, group=self.mesh.get_group())
        return whole


def is_trainable(case: Combination, net: nn.Module) -> bool:
    """Whether one process can train this net to predict the next token."""
    try:
        loss = objective_of(case, AutoregressiveWrapper(net.train()), 0)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):
        return False
    finally:
        decide_alike(None)
    return loss.isfinite().item() is True


def said(model: nn.Module, degrees: Degrees, how: dict[str, Any]) -> Iterator[str]:
    """Why a model cannot be spread in this way."""
    kinds = {name for name in ('tensor', 'context', 'pipeline') if getattr(degrees, name) > 1}
    if how.get('sequence_parallel'):
        kinds.add('sequence parallel')
        yield from sequence_refusals(model)
    if how.get('loss_parallel'):
        yield from vocabulary_refusals(model, degrees.tensor)
    yield from refusals(model, kinds)
    if degrees.tensor > 1:
        yield from check_divides(model, degrees.tensor)
    if degrees.context > 1:
        yield from sliced_refusals(model)
    if degrees.pipeline > 1:
        yield from staged_refusals(model, degrees.pipeline)


if __name__ == '__main__':
    four = bool({text.removeprefix('--') for text in sys.argv} & OF_FOUR.keys())
    command(attempt, list(OF_FOUR if four else MODES), 4 if four else 2)
