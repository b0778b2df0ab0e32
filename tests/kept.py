"""How much a forward keeps for its backward, counted on real tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Kept:
    """The tensors that were kept, by their storage: held, so that no other takes the place of one."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.tensors: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for place, tensor in self.tensors.items() if place not in self.own)


@contextmanager
def kept_by(model: nn.Module) -> Iterator[Kept]:
    """What is kept inside, the model's parameters aside."""
    kept = Kept(model)

    def keep(tensor: Tensor) -> Tensor:
        kept.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
