"""How much a forward keeps for its backward, and how much it holds at once, counted on real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Alive(TorchDispatchMode):
    """The bytes of the tensors that were made inside and were there at the same time: ``most`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()).data_ptr() not in given:
                self._bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._bytes.pop, storage._cdata, None)
        self.most = max(self.most, sum(self._bytes.values()))
        return out
