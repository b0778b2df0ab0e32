"""What a model would need on a number of devices: memory of each, operations, which grid fits. Nothing is computed or sent.

Sizes are those of tensors. What the allocator, the libraries and the network need beside them is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.distributed.mesh import Degrees, MeshError
from x_transformers.distributed.units import units
from x_transformers.training.build import NUM_BYTES, build_model
from x_transformers.training.speed import training_flops

GIB = 2**30
MASTER = 4  # bytes of a weight, its gradient, and each number that the optimizer keeps of it


@dataclass(frozen=True)
class Size:
    """A model without numbers: how many it would have, and what one row of tokens costs."""

    parameters: int
    largest_layer: int  # parameters
    ends: int  # of the table, the final norm and the head
    layers: int
    flops: float  # of a training step on one row
    tokens: int  # predictions of a row
    kept: int  # bytes that a row's forward keeps for its backward
    kept_less: int  # the same where layers are computed again

    @classmethod
    def of(cls, flags: Mapping[str, Any], *, seq_len: int, vocabulary: int = NUM_BYTES, half: bool = True) -> Size:
        """Errors: ``FlagError`` and ``TrainingError`` as for a model that is trained."""
        given = {'max_seq_len': seq_len} | dict(flags)
        with torch.device('meta'):
            model = build_model(given, vocabulary)
        layers = [unit for unit in units(model) if len(unit) == 1]
        rest = [unit for unit in units(model) if len(unit) > 1]
        total = count(model)
        kept, flops = of_a_row(given, vocabulary, seq_len, half)
        again, _ = of_a_row(given | {'gradient_checkpointing': True}, vocabulary, seq_len, half)
        # while a layer is computed again, what it keeps is there once more
        again += max(kept - again, 0) // max(len(layers), 1)
        return cls(
            total, max((count(unit[0]) for unit in layers), default=0), sum(count(part) for unit in rest for part in unit),
            len(layers), flops, seq_len - 1, kept, min(again, kept),
        )  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def of_a_row(flags: Mapping[str, Any], vocabulary: int, seq_len: int, half: bool) -> tuple[int, float]:
    """(bytes that a row's forward keeps for its backward, beside the parameters; operations of both).

    Found on tensors that have a device but no numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from x_transformers.cli.info import halve

    kept: dict[int, tuple[Tensor, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cpu'):
        model = build_model(flags, vocabulary).train()
        if half:
            halve(model)
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                # the tensor is held, so that no other one takes its place
                kept[storage._cdata] = tensor, storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids)
        size = sum(size for _, size in kept.values())
        return size, training_flops(model, ids)


@dataclass(frozen=True)
class Need:
    """Bytes of one device under one grid."""

    name: str
    degrees: Degrees
    checkpointing: bool
    weights: float
    gradients: float
    optimizer: float
    gathered: float  # of layers that run, beside the parts that are always there
    activations: float

    @property
    def total(self) -> float:
        kept = self.weights + self.optimizer + self.gathered
        if self.degrees.shard == 1:
            # copies hold the room of all gradients from the beginning
            return kept + self.gradients + self.activations
        # what a layer has kept is let go of when its gradients are made, so the two are never there in full together
        return kept + max(self.gradients, self.activations)


def needs(
    size: Size, *, devices: int, per_node: int, batch: int, half: bool = True, optimizer_numbers: int = 2
) -> Iterator[Need]:
    """Of every grid, those first that send least.

    Args:
        batch: rows of a step, over all devices.
        optimizer_numbers: of AdamW two for each weight; of Muon one, for its matrices.
    """
    if devices < 1 or batch % devices:
        raise MeshError(f'--batch must be a multiple of --gpus ({devices}), got {batch}: it counts the rows of all of them.')
    within = min(per_node, devices)
    grids = {'copies (--shard none)': Degrees(replicate=devices)}
    if within < devices and devices % within == 0:
        grids['parts in a node (--shard hybrid)'] = Degrees(replicate=devices // within, shard=within)
    grids['parts over all (--shard full)'] = Degrees(shard=devices)
    rows, compute = batch // devices, 2 if half else MASTER
    for checkpointing in (False, True):
        for name, degrees in grids.items():
            share = MASTER * size.parameters / degrees.shard
            if degrees.shard == 1:
                # copies: gradients lie once more in the pieces that are sent; autocast makes halves of one layer at a time
                gathered = share + (2 * size.largest_layer if half else 0)
            else:
                # the layer that runs, the next one and the ends; and the gradients of a layer before they are summed
                gathered = compute * (2 * size.largest_layer + size.ends) + MASTER * size.largest_layer
            kept = rows * (size.kept_less if checkpointing else size.kept)
            yield Need(name, degrees, checkpointing, share, share, optimizer_numbers * share, gathered, kept)
