"""The training engine for pipeline stages: the methods that differ from ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from x_transformers.distributed.building import build_stage
from x_transformers.distributed.crossing import described
from x_transformers.distributed.engine import MeshEngine, number_of
from x_transformers.distributed.pipeline import Pipeline
from x_transformers.tensor_types import Float


class StagedEngine(MeshEngine):
    """Stages of a pipeline, and possibly copies of all stages that read other data.

    The micro-batches of a step pass through the stages one after the other, so there should be more of them than stages.
    """

    pipeline: Pipeline

    def build(self, make: Callable[[], nn.Module], device: torch.device, seed: int) -> nn.Module:
        stage = self.world.mesh.get_local_rank('pipeline')
        return self.spread(build_stage(make, stage, self.world.degrees.pipeline), seed)

    def spread(self, model: nn.Module, seed: int = 0) -> nn.Module:
        model = super().spread(model, seed)
        self.pipeline = Pipeline.of(model)
        return model

    def begin_step(self, seed: int, step: int) -> None:
        super().begin_step(seed, step)
        self.seeds = seed, step

    def gradients(
        self, loss: Callable[[Any], Float[Tensor, '']], batches: Sequence[Any], shares: Sequence[float]
    ) -> list[Tensor]:
        def one(micro: int) -> Float[Tensor, '']:
            # random numbers must not depend on the micro-batches that this stage ran before
            torch.manual_seed(number_of(*self.seeds, self.rank, micro))
            return loss(batches[micro]) * shares[micro]

        counted = [micro for micro, share in enumerate(shares) if share > 0]
        jobs = [partial(one, micro) for micro in counted]
        return list(self.pipeline.gradients(jobs, [described(batches[micro]) for micro in counted]))

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Float[Tensor, '']:
        own = [p.grad for p in parameters if p.grad is not None and self.pipeline.counts(p)]
        square = torch.zeros((), device=self.device, dtype=torch.float64)
        if own:
            square += torch.stack(torch._foreach_norm(own)).double().square().sum()
        dist.all_reduce(square, group=self.pipeline.group)
        return square.sqrt()

    def flops(self, count: Callable[[], float]) -> float:
        count()  # the first run of a shape includes a trial
        found = torch.tensor(count(), dtype=torch.float64, device=self.device)
        dist.all_reduce(found, group=self.pipeline.group)
        return float(found)
