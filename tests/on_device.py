"""Tests on another device: what a test or a constructor makes lies there; what a call makes must name the device itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import x_transformers
from tests import elsewhere

TESTS = str(Path(__file__).parent)
LIBRARY = str(Path(x_transformers.__file__).parent)
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


class OnDevice(TorchFunctionMode):
    """Inside, tensors that a test makes, and parameters and buffers of modules, lie on ``device``.

    Unlike ``with torch.device(...)`` it leaves alone what the library makes in a forward without naming a device: that is
    a defect on a GPU, and here it is seen.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.makers = _device_constructors()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func not in self.makers:
            return func(*args, **given)
        device = given.get('device') or (None if in_a_call() else self.device)
        generator = given.get('generator')
        if device is None or (func not in FROM_VALUES and generator is None):
            return func(*args, **given | ({} if device is None else {'device': device}))
        # what is drawn on the CPU, or written down in Python, is moved afterwards
        made = func(*args, **given | {'device': None if generator is None else generator.device})
        return made.to(device)


def enter(device: str) -> None:
    """Make tensors there from now on, to the end of the process. ``elsewhere`` is one that every machine can pretend to have,
    if the process has not gone backwards yet."""
    if device == elsewhere.NAME:
        device = str(elsewhere.device())
        elsewhere.Elsewhere().__enter__()
    if device != 'cpu':
        OnDevice(device).__enter__()


def in_a_call() -> bool:
    """Whether the library asks, and not in order to build a module."""
    frame = sys._getframe(2)
    while frame is not None:
        where, builds = frame.f_code.co_filename, frame.f_code.co_name in ('__init__', 'reset_parameters')
        if where.startswith(TESTS) or (builds and isinstance(frame.f_locals.get('self'), nn.Module)):
            return False
        if where.startswith(LIBRARY) and frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(TESTS):
            return True
        frame = frame.f_back
    return False
