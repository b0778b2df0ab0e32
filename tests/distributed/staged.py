"""A model cut into the stages of a pipeline against one process: losses, every gradient, and what an evaluation says."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.laws.combination import Combination
from tests.two_processes import CLOSE, batch_of
from x_transformers import AutoregressiveWrapper
from x_transformers.distributed.crossing import described
from x_transformers.distributed.mesh import World
from x_transformers.distributed.parallelize import parallelize
from x_transformers.distributed.pipeline import Pipeline

MICROS = 3  # of each reader, so that forwards and backwards of two stages alternate


def check_staged(case: Combination, model: nn.Module, world: World, how: dict[str, Any]) -> None:
    """In double precision, micro-batches that go through the stages have the losses and the gradients of one process."""
    alone = copy.deepcopy(model.train())
    numbers = [range(MICROS * reader, MICROS * (reader + 1)) for reader in range(world.data_size)]
    wanted = [[measure(case, alone, number) for number in own] for own in numbers]
    torch.stack([loss for own in wanted for loss in own]).sum().backward()
    parallelize(model, world, **how)
    pipeline, own = Pipeline.of(model), numbers[world.data_rank]
    # of what stands in a layer each has a part, and none has all
    held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    assert held < sum(parameter.numel() for parameter in model.parameters())
    found = pipeline.gradients(
        [partial(measure, case, model, number) for number in own],
        [described(batch_of(case, number)[1]) for number in own],
    )
    problems = [
        f'loss {number} is {got}, not {want}'
        for number, got, want in zip(own, found.tolist(), wanted[world.data_rank], strict=True)
        if not abs(got - want.item()) <= CLOSE * max(1.0, abs(want.item()))
    ]
    agree(problems + list(wrong_gradients(model, alone)))
    with torch.no_grad():
        want, got = (measure(case, each.eval(), 0) for each in (alone, model))
    near = (got - want).abs().item() <= CLOSE * max(1.0, abs(want.item()))
    agree([] if near else [f'in evaluation: {got}, not {want}'])


def measure(case: Combination, model: Any, number: int) -> Tensor:
    """One number made of all that a model says of the batch of this number, which also seeds what is drawn."""
    torch.manual_seed(number)
    x, given = batch_of(case, number)
    if isinstance(model, AutoregressiveWrapper):
        loss: Tensor = model(x, **given)
        return loss
    out = case.call(model, x, given)
    weighted: Tensor = (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum()
    return weighted


def wrong_gradients(model: nn.Module, alone: nn.Module) -> list[str]:
    wanted, problems = dict(alone.named_parameters()), []
    parameters = {name.replace('_checkpoint_wrapped_module.', ''): parameter for name, parameter in model.named_parameters()}
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        got, want = parameter.grad, wanted[name].grad
        if parameter.is_meta:
            assert got is None
        elif got is None or want is None:
            problems += [] if got is want else [f'{name} has {"no" if got is None else "a"} gradient']
        elif want.numel() and not (gap := (got - want).abs().max().item()) <= CLOSE * max(1.0, want.abs().max().item()):
            problems.append(f'gradient of {name} differs by {gap:.2g}')
    return problems


def agree(problems: list[str]) -> None:
    """All processes fail where one does: else they would wait for each other."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, problems)
    told = [problem for each in everywhere for problem in each]
    assert not told, '; '.join(told[:5])
