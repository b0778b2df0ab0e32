"""Pipeline parallelism: each process has a stage of some layers, and sends its output to the next.

The schedule and what is sent are those of ``torch.distributed.pipelining``.

Every stage runs the forward of the model on the same tokens, so masks and positions need not be sent. Within the stack, every
stage but the first replaces the input by the streams of the stage before. Every stage but the last stops after its last layer;
the last one has the head and the loss. Tensors that layers pass to layers of another stage are sent with the streams, and so is
the state of the random generator: dropout equals that of one process.

Layers of other stages are on the meta device, so names, and indices in optimizers, are those of the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from x_transformers.distributed.crossing import as_sent, described, put_together, set_drawn, state_of_draws, taken_apart
from x_transformers.distributed.degrees import MeshError
from x_transformers.distributed.mesh import World
from x_transformers.distributed.stages import leave_elsewhere, network, placed_modules, steps_of
from x_transformers.layers.call import Carry, Inputs, Record
from x_transformers.layers.stack import AttentionLayers
from x_transformers.tensor_types import Float, Int, Shaped, Tensors

# fields of ``Carry`` that depend on the stack alone
OF_THE_STACK = {'hands_on_scores', 'hands_on_values', 'mixes', 'keys_from'}


class Crossed(NamedTuple):
    """All that the layers of later stages need from earlier ones."""

    streams: Tensor
    carried: dict[str, Any]
    injected: Tensor | None
    expert_loss: Tensor | None
    drawn: Tensor  # state of the random generator


class HandedOn(BaseException):
    """Raised at the end of a stage, which skips the rest of the forward. It is no error."""

    def __init__(self, crossed: Crossed) -> None:
        self.crossed = crossed


StageJob = Callable[[], Any]


class Part(nn.Module):
    """The module that PyTorch's engine runs: it runs the job of a micro-batch."""

    def __init__(self, run: Callable[[int, Tensors], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *received: Shaped[Tensor, '...'], micro: Int[Tensor, '1']) -> Any:
        return self.run(int(micro), received)


class Pipeline:
    """A model split into the stages of ``world``, one of which is on this process. ``model`` is changed in place.

    Calling the model, or its network, runs all stages without gradients and returns the result on all of them. ``gradients``
    trains it.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.net, self.device = model, network(model), world.device
        self.stack: AttentionLayers = self.net.attn_layers
        self.group, self.copies = world.mesh.get_group('pipeline'), world.data_mesh.get_group()
        self.stage, self.stages = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.steps = steps_of(self.stack, self.stages)[self.stage]
        self.received: tuple[Any, ...] | None = None  # while a job runs
        self.form: Any = None
        self.trying = False
        self.jobs: list[StageJob] = []
        self.answer: Any = None
        self.made: dict[bool, tuple[Any, Any, Any]] = {}  # for training or not: (key, form, schedule)
        has_table = self.net.token_emb in placed_modules(self.net, self.stages)
        self.places = leave_elsewhere(model, self.net, self.stage, self.stages)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        self.stack.run = self._run_part
        if self.stage > 0 and has_table:
            self.net.token_emb.forward = self._no_embedding
        # decoding with a cache is not supported
        self.net.can_cache_kv = False
        for module in dict.fromkeys((model, self.net)):
            self._route(module)

    @staticmethod
    def of(model: nn.Module) -> Pipeline:
        """The pipeline of a model that ``parallelize`` has split."""
        forward: Any = model.forward
        found: Pipeline = forward.pipeline
        return found

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def _route(self, module: Any) -> None:
        """Route outer calls through all stages. A call within a job runs this stage's part."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.received is not None:
                return own(*args, **kwargs)
            return self.evaluate(lambda: own(*args, **kwargs), (module is self.net, *described((args, kwargs))))

        forward.pipeline = self  # type: ignore[attr-defined]
        forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        module.forward = forward

    def _no_embedding(self, x: Int[Tensor, '...'], **given: Any) -> Float[Tensor, '... d']:
        """Zeros in place of the embeddings, which only the first stage computes."""
        table = self.net.token_emb.emb.weight
        return torch.zeros(*x.shape, table.shape[-1], dtype=table.dtype, device=x.device)

    # ------------------------------------------------------------ this stage's part of a forward

    def _run_part(self, x: Float[Tensor, 'b n d'], call: Inputs) -> tuple[Float[Tensor, 'b n d'], Record]:
        """Replaces the stack's ``run``."""
        if self.received is None:
            raise MeshError('the model must be called as a whole with --pipeline, got a call of its stack. Call the model.')
        if call.steps != self.stack.plan.own_steps:
            raise MeshError(
                'layers must be run in their own order with --pipeline. Leave layers_execute_order and repeat_blocks out.'
            )
        record = Record(wanted=call.return_attn, cache=call.cache)
        if self.stage == 0:
            streams, carry = self.stack.enter(x)
        else:
            crossed: Crossed = put_together(self.form, self.received)
            streams, carry = crossed.streams, replace(self.stack.carry(), **crossed.carried)
            call, record.expert_loss = replace(call, injected=crossed.injected), crossed.expert_loss
            if not self.trying:
                set_drawn(crossed.drawn, self.device)
        streams = self.stack.walk(streams, replace(call, steps=self.steps), carry, record)
        if self.is_last:
            return self.stack.leave(streams, call, carry, record), record
        drawn, carried = state_of_draws(self.device), self._needed_later(carry)
        raise HandedOn(Crossed(streams, carried, call.injected, record.expert_loss, drawn))

    def _needed_later(self, carry: Carry) -> dict[str, Any]:
        carried = {each.name: getattr(carry, each.name) for each in fields(carry) if each.name not in OF_THE_STACK}
        skips = {spec.skip_from for spec in self.stack.plan.layers}
        return carried | {'skips': {layer: stream for layer, stream in carry.skips.items() if layer in skips}}

    def _part(self, job: StageJob, received: Tensors) -> tuple[Any, list[Tensor]]:
        """(the structure of what is sent, its tensors); in the last stage (the result, no tensors)."""
        self.received = received
        try:
            return job(), []
        except HandedOn as end:
            tensors: list[Tensor] = []
            form = taken_apart(end.crossed, tensors)
            return form, [as_sent(tensor) for tensor in tensors]
        finally:
            self.received = None

    def _micro(self, number: int, received: Tensors) -> Any:
        found, tensors = self._part(self.jobs[number], received)
        if not self.is_last:
            return tuple(tensors)
        self.answer = found
        return found if torch.is_grad_enabled() else torch.zeros(1, device=self.device)

    # ------------------------------------------------------------ all stages

    def _schedule(self, jobs: Sequence[StageJob], key: Any, trains: bool) -> Any:
        """PyTorch's schedule for micro-batches of one shape. The first one of a shape is a trial, which shows what is sent."""
        self.jobs = list(jobs)
        key = (len(jobs), key)
        if self._any(trains not in self.made or self.made[trains][0] != key):
            takes, gives, form = self._lay_out(jobs[0])
            stage = PipelineStage(
                Part(self._micro), self.stage, self.stages, self.device, input_args=takes, output_args=gives, group=self.group
            )
            kind = Schedule1F1B if trains and len(jobs) >= self.stages else ScheduleGPipe
            loss = (lambda loss, target: loss) if trains else None
            self.made[trains] = key, form, kind(stage, len(jobs), loss_fn=loss, scale_grads=False)
        _, self.form, schedule = self.made[trains]
        return schedule

    def _any(self, here: bool) -> bool:
        """Whether ``here`` is true on at least one stage."""
        count = torch.tensor(int(here), device=self.device)
        dist.all_reduce(count, group=self.group)
        return bool(count)

    def _lay_out(self, job: StageJob) -> tuple[Tensors, Tensors, Any]:
        """(example tensors that this stage receives, those that it sends, the structure of what it receives).

        Errors: ``ValueError`` on all stages if the job fails on one.
        """
        takes: Tensors = ()
        gives: Tensors = ()
        form = None
        self.trying = True
        with torch.random.fork_rng(devices=[self.device] if self.device.type == 'cuda' else []):
            try:
                for stage in range(self.stages):
                    said: list[Any] = [None]
                    if stage == self.stage:
                        self.form = form
                        said, gives = self._tried(job, takes)
                    dist.broadcast_object_list(said, group=self.group, group_src=stage)
                    if isinstance(said[0], str):
                        raise ValueError(said[0])
                    if stage == self.stage - 1:
                        form, shapes = said[0]
                        takes = tuple(
                            torch.zeros(shape, dtype=dtype, device=self.device).requires_grad_(learns)
                            for shape, dtype, learns in shapes
                        )
            finally:
                self.trying = False
        return takes, gives, form

    def _tried(self, job: StageJob, takes: Tensors) -> tuple[list[Any], Tensors]:
        try:
            found, tensors = self._part(job, takes)
        except Exception as error:
            return [f'{error}'], ()
        if self.is_last:
            return [None], (found if torch.is_grad_enabled() else torch.zeros(1, device=self.device),)
        shapes = [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors]
        return [(found, shapes)], tuple(tensors)

    def evaluate(self, job: StageJob, key: Any) -> Any:
        """The result of a job, which the last stage computes, on all stages; without gradients."""
        with torch.no_grad():
            self._schedule([job], (self.model.training, key), False).step(
                micro=torch.zeros(1, dtype=torch.long), return_outputs=False
            )
        found, self.answer, self.jobs = [self.answer, state_of_draws(self.device)], None, []
        dist.broadcast_object_list(found, group=self.group, group_src=self.stages - 1, device=self.device)
        set_drawn(found[1], self.device)
        return found[0]

    def gradients(self, jobs: Sequence[StageJob], keys: Sequence[Any]) -> Float[Tensor, ' m']:
        """The losses that the jobs return. Their gradients are accumulated in the parameters.

        Copies of the stages have their own jobs; gradients are summed over all of them. A job that draws random numbers must
        seed the generator first. ``keys``: for each job a key that determines the shapes of its tensors.
        """
        found: list[Tensor] = []
        for key, group in groupby(range(len(jobs)), key=lambda number: keys[number]):
            some = [jobs[number] for number in group]
            losses: list[Tensor] = []
            given = {'target': torch.arange(len(some)), 'losses': losses} if self.is_last else {}
            schedule = self._schedule(some, (self.model.training, key), True)
            schedule.step(micro=torch.arange(len(some)), return_outputs=False, **given)
            found += losses
        everywhere = torch.zeros(len(jobs), dtype=torch.float64, device=self.device)
        if self.is_last:
            everywhere += torch.stack([loss.detach() for loss in found])
        dist.broadcast(everywhere, group=self.group, group_src=self.stages - 1)
        self.jobs = []
        self.add_up()
        return everywhere

    def add_up(self) -> None:
        """Sum gradients over all stages that share a parameter, and over all copies of the stages."""
        learning = [(parameter, stages) for parameter, stages in self.places.items() if parameter.requires_grad]
        self._add([parameter for parameter, stages in learning if len(stages) > 1], self.group)
        self._add([parameter for parameter, _ in learning if not parameter.is_meta], self.copies)

    def _add(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        """A parameter that no stage has used gets no gradient."""
        if dist.get_world_size(group) == 1 or not parameters:
            return
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(used, group=group)
        for parameter in (parameter for parameter, count in zip(parameters, used.tolist(), strict=True) if count):
            own = parameter.grad
            if own is None:
                own = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
            dist.all_reduce(own, group=group)
            if not parameter.is_meta:
                parameter.grad = own

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this stage is the first one with the parameter, which counts it."""
        return min(self.places[parameter]) == self.stage
