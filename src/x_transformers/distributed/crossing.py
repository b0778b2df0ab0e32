"""Transfer between pipeline stages: tensors, and the description of their structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.tensor_types import Int, Shaped


class Place(NamedTuple):
    """The placeholder of a tensor: its index among the tensors sent, and its dtype, because masks are sent as bytes."""

    number: int
    dtype: torch.dtype


def taken_apart(value: Any, tensors: list[Shaped[Tensor, '...']]) -> Any:
    """The value with a placeholder for each tensor. Each tensor is appended to ``tensors`` once."""

    def place(tensor: Shaped[Tensor, '...']) -> Place:
        number = next((number for number, known in enumerate(tensors) if known is tensor), len(tensors))
        if number == len(tensors):
            tensors.append(tensor)
        return Place(number, tensor.dtype)

    return rebuilt(value, Tensor, place)


def put_together(form: Any, tensors: Sequence[Shaped[Tensor, '...']]) -> Any:
    """The value that ``taken_apart`` was called with, from the tensors that were sent."""

    def tensor(place: Place) -> Shaped[Tensor, '...']:
        sent = tensors[place.number]
        return sent.view(torch.bool) if place.dtype == torch.bool else sent

    return rebuilt(form, Place, tensor)


def rebuilt(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The tree with ``change`` applied to each leaf of a kind. PyTorch's ``tree_map`` does not enter dataclasses."""
    if isinstance(tree, kind):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree)(**{each.name: rebuilt(getattr(tree, each.name), kind, change) for each in fields(tree) if each.init})
    if isinstance(tree, dict):
        return {name: rebuilt(each, kind, change) for name, each in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [rebuilt(each, kind, change) for each in tree]
        return type(tree)(*parts) if hasattr(tree, '_fields') else type(tree)(parts)
    return tree


def as_sent(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
    """The tensor as a backend can send it: contiguous, and bytes in place of booleans."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def described(given: Any) -> tuple[Any, ...]:
    """A key that determines the shapes of a call: the shapes of its tensors, and its other arguments."""
    tensors: list[Tensor] = []
    form = taken_apart(given, tensors)
    return repr(form), *((tensor.shape, tensor.dtype) for tensor in tensors)


def state_of_draws(device: torch.device) -> Int[Tensor, ' k']:
    """The state of the random generator that dropout uses."""
    state = torch.get_rng_state() if device.type == 'cpu' else torch.get_device_module(device).get_rng_state(device)
    return state.to(device)


def set_drawn(state: Int[Tensor, ' k'], device: torch.device) -> None:
    if device.type == 'cpu':
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state.cpu(), device)
