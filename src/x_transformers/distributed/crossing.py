"""What crosses from one stage of a pipeline to the next: tensors, and the form that says what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Stands for a tensor: its number among those that cross, and its kind, as masks are sent as bytes."""

    number: int
    dtype: torch.dtype


def taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The same with a place for each tensor, which goes to ``tensors``, once."""
    if isinstance(value, Tensor):
        number = next((number for number, known in enumerate(tensors) if known is value), len(tensors))
        if number == len(tensors):
            tensors.append(value)
        return Place(number, value.dtype)
    if is_dataclass(value) and not isinstance(value, type):
        given = {each.name: taken_apart(getattr(value, each.name), tensors) for each in fields(value) if each.init}
        return type(value)(**given)
    if isinstance(value, dict):
        return {name: taken_apart(each, tensors) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [taken_apart(each, tensors) for each in value])
    return value


def put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(form, Place):
        sent = tensors[form.number]
        return sent.view(torch.bool) if form.dtype == torch.bool else sent
    if is_dataclass(form) and not isinstance(form, type):
        return type(form)(**{each.name: put_together(getattr(form, each.name), tensors) for each in fields(form) if each.init})
    if isinstance(form, dict):
        return {name: put_together(each, tensors) for name, each in form.items()}
    if isinstance(form, (list, tuple)):
        return rebuilt(form, [put_together(each, tensors) for each in form])
    return form


def rebuilt(like: Any, parts: list[Any]) -> Any:
    return type(like)(*parts) if hasattr(like, '_fields') else type(like)(parts)


def as_sent(tensor: Tensor) -> Tensor:
    """Whole rows, and no kind that a backend cannot send."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def described(given: Any) -> tuple[Any, ...]:
    """What the shapes of a call follow from: those of its tensors, and what else it was given."""
    tensors: list[Tensor] = []
    form = taken_apart(given, tensors)
    return repr(form), *((tensor.shape, tensor.dtype) for tensor in tensors)


def state_of_draws(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from."""
    state = torch.get_rng_state() if device.type == 'cpu' else torch.get_device_module(device).get_rng_state(device)
    return state.to(device)


def set_drawn(state: Tensor, device: torch.device) -> None:
    if device.type == 'cpu':
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state.cpu(), device)
