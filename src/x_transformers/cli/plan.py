"""``x-transformers plan``: the memory and time that a model needs on many devices, computed without any."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from x_transformers.cli.options import GROUPS, ModelOptions, model_fields, preset_option
from x_transformers.cli.parse import parse_typed
from x_transformers.cli.toml import config_path, from_file
from x_transformers.distributed.costs import RowGroup
from x_transformers.distributed.plan import GIB, Need, Size, needs, readers_of
from x_transformers.training.errors import TrainingError

ABOUT = """Estimate a training run: parameters, operations, and the memory of one device for each grid of devices.

No device is needed: the figures are computed from the shapes of tensors, not measured.
"""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    config: str | None = None
    """TOML file with any of these options; the command line overrides it."""
    gpus: int = 8
    """Devices that train together."""
    per_node: int = 8
    """Devices of one node. Data moves fast between them."""
    memory: float = 80.0
    """GiB of one device."""
    tensor: int = 1
    """Devices that share the heads of each attention and the inner features of each feed-forward."""
    sequence_parallel: bool = False
    """With --tensor: each device holds a slice of the sequence between attentions and feed-forwards."""
    loss_parallel: bool = False
    """With --tensor: each device computes the logits of a part of the vocabulary."""
    context: int = 1
    """Devices that share each sequence."""
    pipeline: int = 1
    """Pipeline stages, each of which holds some of the layers."""
    batch: int = 0
    """Sequences of a micro-batch on all devices together; 0: one for each device that reads its own data."""
    grad_accum: int = 1
    """Micro-batches of a step. With --pipeline they pass through the stages one after the other."""
    seq_len: int = 4096
    """Tokens of a sequence."""
    vocab: int = 256
    """Tokens of the vocabulary."""
    bf16: bool = True
    """Compute in bfloat16; weights, gradients and the optimizer's state stay in float32."""
    peak_flops: float | None = None
    """Peak operations per second of one device. If given, the command estimates tokens per second."""
    mfu: float = 0.4
    """Share of the peak that the estimate assumes."""
    json: bool = False
    """Print one line of JSON at the end."""


def plan_class() -> type:
    fields: list[tuple[str, Any, Any]] = [
        ('options', Annotated[PlanOptions, tyro.conf.arg(name='')], dataclasses.field(default_factory=PlanOptions)),
        ('preset', preset_option(), dataclasses.field(default=None)),
        *model_fields(),
    ]
    command = dataclasses.make_dataclass('Plan', fields, frozen=True)
    command.__doc__ = ABOUT
    return command


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], PlanOptions]:
    command, path = plan_class(), config_path(arguments)
    file = from_file(path, PlanOptions, arguments)
    default = command(options=PlanOptions(**file.own | {'config': path}), preset=file.preset, **file.groups)
    read = parse_typed(default, arguments, 'x-transformers plan')
    options: PlanOptions = read.options
    lowest = {
        'gpus': 1, 'per_node': 1, 'tensor': 1, 'context': 1, 'pipeline': 1, 'batch': 0, 'grad_accum': 1, 'seq_len': 2,
        'vocab': 2,
    }  # fmt: skip
    wrong = [
        f'--{name.replace("_", "-")} must be at least {low}, got {getattr(options, name)}.'
        for name, low in lowest.items()
        if getattr(options, name) < low
    ]
    if not options.memory > 0:
        wrong.append(f'--memory must be above 0, got {options.memory:g}.')
    if not 0 < options.mfu <= 1:
        wrong.append(f'--mfu must be above 0 and at most 1, got {options.mfu:g}.')
    if options.peak_flops is not None and not options.peak_flops > 0:
        wrong.append(f'--peak-flops must be above 0, got {options.peak_flops:g}.')
    if wrong:
        raise TrainingError(' '.join(wrong))
    flags = ModelOptions(**{group: getattr(read, group) for group in GROUPS}).given() | file.only_here
    return flags, options


def main(arguments: Sequence[str]) -> int:
    flags, options = parse(arguments)
    group = RowGroup(options.tensor, options.sequence_parallel, options.loss_parallel, options.context)
    # before what takes long
    readers = readers_of(options.gpus, group.size * options.pipeline, options.batch)
    size = Size.of(
        flags, seq_len=options.seq_len, vocabulary=options.vocab, half=options.bf16, group=group, pipeline=options.pipeline
    )
    batch = options.batch or readers
    grid_needs = list(
        needs(
            size, devices=options.gpus, per_node=options.per_node, batch=batch, half=options.bf16, micros=options.grad_accum
        )
    )  # fmt: skip
    print('\n'.join([*about(size, options, batch, readers), '', *plan_table(grid_needs, options.memory * GIB)]))
    if options.json:
        grids = [
            dataclasses.asdict(need) | {'total': need.total, 'fits': need.total <= options.memory * GIB} for need in grid_needs
        ]
        print(
            json.dumps(
                {
                    'parameters': size.parameters,
                    'flops_per_step': size.flops * batch * options.grad_accum,
                    'batch': batch,
                    'grids': grids,
                }
            )
        )
    return 0


def about(size: Size, options: PlanOptions, batch: int, readers: int) -> list[str]:
    rows, micros = batch // readers, options.grad_accum
    step, busiest = size.flops * batch * micros, size.operations(rows, micros)
    again = f' x {micros} micro-batches' if micros > 1 else ''
    lines = [
        f'{size.parameters:,} parameters in {size.layers} layers',
        f'{options.gpus} devices, {batch} x {options.seq_len} tokens{again} a step',
        f'{size.flops / size.tokens:.3g} operations per token (forward and backward), {step:.3g} per step',
    ]
    if size.group.size > 1:
        group = size.group
        share = size.own_flops * group.size / size.flops
        named = ' '.join(f'--{name} {n}' for name, n in (('tensor', group.tensor), ('context', group.context)) if n > 1)
        lines.append(f'{named}: the busiest device of a group does {share:.3g} times its share of these operations')
    if size.stages:
        idle = 1 - sum(stage.flops for stage in size.stages) * rows * micros / (len(size.stages) * busiest)
        flops = ', '.join(f'{stage.flops / size.tokens:.3g}' for stage in size.stages)
        bubble = (len(size.stages) - 1) / (micros + len(size.stages) - 1)
        lines.append(f'--pipeline {len(size.stages)}: operations per token of each stage: {flops}')
        lines.append(
            f'stages wait {100 * idle:.1f} % of a step ({100 * bubble:.1f} % if they had equal work): more --grad-accum is less'
        )
    if options.peak_flops is not None:
        speed = size.tokens * batch * micros * options.peak_flops * options.mfu / busiest
        lines.append(f'{speed:,.0f} tokens per second, if {100 * options.mfu:g} % of {options.peak_flops:.3g} are reached')
    return lines


def plan_table(grid_needs: Sequence[Need], memory: float) -> list[str]:
    """One line for each grid, in GiB of one device, and which is the first that fits."""
    head = f'{"GiB of each device":<44}{"weights":>9}{"grads":>9}{"optimizer":>11}{"gathered":>10}{"kept":>9}{"peak":>9}'
    lines = [head]
    for need in grid_needs:
        name = need.name + (', again' if need.checkpointing else '')
        sizes = (need.weights, need.gradients, need.optimizer, need.gathered, need.activations, need.total)
        widths = (9, 9, 11, 10, 9, 9)
        numbers = ''.join(f'{value / GIB:>{width}.2f}' for value, width in zip(sizes, widths, strict=True))
        lines.append(f'{name:<44}{numbers}')
    lines.append(
        'again: layers are computed again for their gradients (--checkpointing full); kept: for the backward, which lets go'
    )
    lines.append('of it while gradients come, so that parts need the larger of the two alone')
    fits = next((grid for grid in of_each_grid(grid_needs) if max(need.total for need in grid) <= memory), None)
    if fits is None:
        lines.append(f'none of them fits into {memory / GIB:g} GiB: take more devices, a smaller --batch or --seq-len')
    else:
        again = ' --checkpointing full' if fits[0].checkpointing else ''
        name = fits[0].name if fits[0].stage is None else f'all stages of --pipeline {len(fits)}'
        lines.append(f'first that fits into {memory / GIB:g} GiB: {name}{again}')
    return lines


def of_each_grid(grid_needs: Sequence[Need]) -> list[list[Need]]:
    """Needs of one grid side by side: of a pipeline, all its stages."""
    grids: dict[Any, list[Need]] = {}
    for need in grid_needs:
        grid = need.name if need.stage is None else need.degrees
        grids.setdefault((grid, need.checkpointing), []).append(need)
    return list(grids.values())
