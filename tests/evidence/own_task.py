"""A user's own task, as small as can be: it stands for all tasks in the tests of runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from x_transformers.evidence import Task


class Line(Task):
    """Fit a line through points."""

    name = 'line'
    steps = 6
    flags: Mapping[str, Any] = {'bias': True}

    def batch(self, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(8, 3, generator=generator)
        return x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(8, 1, generator=generator)

    def model(self, flags: Mapping[str, Any]) -> nn.Module:
        if flags.get('impossible'):
            raise ValueError('a line cannot do this')
        return Fit(flags)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x, y = self.batch(10**6, 0)
        return {'loss': float(model(x, y))}


class Fit(nn.Module):
    def __init__(self, flags: Mapping[str, Any]) -> None:
        super().__init__()
        self.flags = flags
        self.map = nn.Linear(3, 1, bias=flags['bias'])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.flags.get('slow'):
            time.sleep(self.flags['slow'])
        if self.flags.get('dies') and x.device.type == 'cpu' and torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.flags.get('grows'):
            raise MemoryError
        scale = float('nan') if self.flags.get('breaks') else 1.0
        return scale * (self.map(x) - y).square().mean()


ROWS: list[dict[str, Any]] = []


def collect(row: dict[str, Any]) -> None:
    """A tracker."""
    ROWS.append(row)
