"""Estimates for a number of devices: memory of each, operations, fitting grids. Nothing is computed or sent.

The estimates count tensors. They do not include the memory of the allocator, of libraries and of communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from x_transformers.distributed.costs import Row, RowGroup, costs_of, own_parameters
from x_transformers.distributed.mesh import Degrees, MeshError
from x_transformers.distributed.refusals import check
from x_transformers.distributed.stages import network, places_of, steps_of
from x_transformers.distributed.units import units
from x_transformers.module import own_part
from x_transformers.training.build import NUM_BYTES, build_model

GIB = 2**30
MASTER = 4  # bytes of a weight, its gradient, and each number that the optimizer keeps of it


@dataclass(frozen=True)
class Stage:
    """A pipeline stage. Bytes and operations are for one row of a micro-batch."""

    parameters: int
    kept: int
    kept_less: int
    flops: float
    borders: int  # bytes that come from other stages: streams from the one before, their gradients from the one behind


@dataclass(frozen=True)
class Size:
    """The size of a model on the meta device: its parameters, and the cost of one row of tokens."""

    parameters: int
    own: int  # parameters of a process of a tensor group, all of them where there is none; so the next two
    largest_layer: int
    ends: int  # of the table, the final norm and the head
    layers: int
    flops: float  # of a training step on one row
    own_flops: float  # of the busiest process of those that share the row
    tokens: int  # predictions of a row
    kept: int  # bytes that a row's forward keeps for its backward, in the process that keeps most
    kept_less: int  # the same where layers are computed again
    group: RowGroup
    stages: tuple[Stage, ...]  # none where all devices have all layers

    @classmethod
    def of(
        cls,
        flags: Mapping[str, Any],
        *,
        seq_len: int,
        vocabulary: int = NUM_BYTES,
        half: bool = True,
        group: RowGroup | None = None,
        pipeline: int = 1,
    ) -> Size:
        """Errors: ``FlagError``, ``TrainingError`` and ``MeshError`` as for a model that is trained so."""
        given, group = {'max_seq_len': seq_len} | dict(flags), group or RowGroup()
        with torch.device('meta'):
            whole = build_model(given, vocabulary)
        check_grid(whole, group, pipeline)
        given['verbose'] = False  # warnings about the flags have been printed
        model = own_parameters(given, vocabulary, group)
        layers = [unit for unit in units(model) if len(unit) == 1]
        rest = [unit for unit in units(model) if len(unit) > 1]
        row = costs_of(given, vocabulary, seq_len, half, group)
        again = costs_of(given, vocabulary, seq_len, half, group, again=True)
        alone = row if group.size == 1 else costs_of(given, vocabulary, seq_len, half, RowGroup())
        kept = sum(row.kept)
        return cls(
            count(whole), count(model), max((count(unit[0]) for unit in layers), default=0),
            sum(count(part) for unit in rest for part in unit), len(layers), sum(alone.flops), sum(row.flops), seq_len - 1,
            kept, kept_again(kept, sum(again.kept), len(layers)), group, tuple(stages_of(whole, row, again, pipeline)),
        )  # fmt: skip

    def operations(self, rows: int, micros: int) -> float:
        """The operations that the busiest device could execute during a step; with stages, including the time it waits."""
        if not self.stages:
            return self.own_flops * rows * micros
        return max(stage.flops for stage in self.stages) * rows * (micros + len(self.stages) - 1)


def check_grid(model: nn.Module, group: RowGroup, pipeline: int) -> None:
    degrees = Degrees(tensor=group.tensor, context=group.context, pipeline=pipeline)
    # stages cannot be sharded; tensor groups with slices must be
    shard = 'none' if pipeline > 1 else 'full'
    check(
        model, degrees, shard=shard, checkpoint='none', precision=None, compile=False, offload=False,
        sequence_parallel=group.sequence_parallel, loss_parallel=group.loss_parallel,
    )  # fmt: skip


def count(module: nn.Module) -> int:
    """The number of parameters of this process."""
    return sum(own_part(parameter).numel() for parameter in module.parameters())


def kept_again(kept: int, again: int, layers: int) -> int:
    """The bytes that a layer saves while it is recomputed."""
    return min(again + max(kept - again, 0) // max(layers, 1), kept)


def stages_of(model: nn.Module, row: Row, again: Row, stages: int) -> Iterator[Stage]:
    if stages == 1:
        return
    net, last = network(model), stages - 1
    places = places_of(model, net, stages)
    numbers = [len(steps) for steps in steps_of(net.attn_layers, stages)]
    for stage, (first, end) in enumerate(pairwise(accumulate(numbers, initial=1))):
        # before the layers, every stage runs everything except the table
        own = slice(0 if stage == 0 else first, end + (stage == last))
        kept, less = sum(row.kept[own]), sum(again.kept[own])
        enters = row.entering[first - 1] if stage > 0 else 0
        leaves = row.entering[end - 1] if stage < last else 0
        parameters = sum(parameter.numel() for parameter, at in places.items() if stage in at)
        yield Stage(parameters, kept, kept_again(kept, less, end - first), sum(row.flops[own]), enters + leaves)


@dataclass(frozen=True)
class Need:
    """Bytes of one device under one grid."""

    name: str
    degrees: Degrees
    checkpointing: bool
    weights: float
    gradients: float
    optimizer: float
    gathered: float  # of layers that run, beside the parts that are always there; what has come from other stages
    activations: float
    together: bool  # whether saved tensors and all gradients exist at the same time
    stage: int | None = None

    @property
    def total(self) -> float:
        kept = self.weights + self.optimizer + self.gathered
        if self.together:
            return kept + self.gradients + self.activations
        # a layer frees its saved tensors when its gradients are computed, so both never exist in full
        return kept + max(self.gradients, self.activations)


def needs(
    size: Size,
    *,
    devices: int,
    per_node: int,
    batch: int,
    half: bool = True,
    optimizer_numbers: int = 2,
    micros: int = 1,
) -> Iterator[Need]:
    """The memory under every grid, sorted by communication; with a pipeline, of every stage.

    Args:
        batch: rows of a micro-batch, over all devices.
        optimizer_numbers: numbers per weight in the optimizer's state: 2 for AdamW, 1 for the matrices of Muon.
        micros: micro-batches of a step.
    """
    readers = readers_of(devices, size.group.size * max(len(size.stages), 1), batch)
    rows = batch // readers
    for checkpointing in (False, True):
        if size.stages:
            yield from stage_needs(size, readers, rows, micros, checkpointing, half, optimizer_numbers)
        else:
            yield from grid_needs(size, readers, per_node, rows, micros, checkpointing, half, optimizer_numbers)


def readers_of(devices: int, share: int, batch: int = 0) -> int:
    """How many devices read different rows, if ``share`` devices read the same.

    Errors: ``MeshError`` where that does not divide the devices, or they do not divide the batch.
    """
    if devices < 1 or devices % share:
        raise MeshError(f'--gpus must be a multiple of --tensor times --context times --pipeline ({share}), got {devices}.')
    readers = devices // share
    if batch % readers:
        what = '--gpus' if share == 1 else '--gpus that read different data'
        raise MeshError(f'--batch must be a multiple of {what} ({readers}), got {batch}: it counts the rows of all of them.')
    return readers


def grid_needs(
    size: Size, readers: int, per_node: int, rows: int, micros: int, checkpointing: bool, half: bool, optimizer_numbers: int
) -> Iterator[Need]:
    tensor, context, compute = size.group.tensor, size.group.context, 2 if half else MASTER
    within = min(max(per_node // size.group.size, 1), readers)
    # tensor groups have copies only with sharding
    copies = tensor == 1 or readers * context == 1
    grids = {'copies (--shard none)': Degrees(replicate=readers, tensor=tensor, context=context)} if copies else {}
    if within < readers and readers % within == 0:
        hybrid = Degrees(replicate=readers // within, shard=within, tensor=tensor, context=context)
        grids['parts in a node (--shard hybrid)'] = hybrid
    grids['parts over all (--shard full)'] = Degrees(shard=readers, tensor=tensor, context=context)
    for name, degrees in grids.items():
        # processes with slices of the same rows also hold shards
        holders = degrees.shard * context if name != 'copies (--shard none)' else 1
        part = MASTER * size.own / holders
        buckets = holders == 1 and tensor == 1
        if holders == 1:
            # copies: gradients lie once more in the pieces that are sent; autocast makes halves of one layer at a time
            gathered = (part if buckets else 0) + (2 * size.largest_layer if half else 0)
        else:
            # the layer that runs, the next one and the ends; and the gradients of a layer before they are summed
            gathered = compute * (2 * size.largest_layer + size.ends) + MASTER * size.largest_layer
        kept = rows * (size.kept_less if checkpointing else size.kept)
        # copies hold the room of all gradients from the beginning, and later micro-batches find those of earlier ones
        together = buckets or micros > 1
        yield Need(name, degrees, checkpointing, part, part, optimizer_numbers * part, gathered, kept, together)


def stage_needs(
    size: Size, copies: int, rows: int, micros: int, checkpointing: bool, half: bool, optimizer_numbers: int
) -> Iterator[Need]:
    stages = len(size.stages)
    degrees = Degrees(replicate=copies, pipeline=stages)
    for number, stage in enumerate(size.stages):
        part = MASTER * stage.parameters
        # 1F1B: as many micro-batches are in flight as there are later stages
        waiting = stages - number if micros >= stages else micros
        gathered = rows * micros * stage.borders + (2 * size.largest_layer if half else 0)
        kept = waiting * rows * (stage.kept_less if checkpointing else stage.kept)
        name = f'stage {number + 1} of {stages} (--pipeline {stages})'
        yield Need(
            name, degrees, checkpointing, part, part, optimizer_numbers * part, gathered, kept, micros > 1, number
        )  # fmt: skip
