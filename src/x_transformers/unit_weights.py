"""The normalized transformer (nGPT): vectors of unit length, with learned scales.

https://arxiv.org/abs/2410.01131
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float


class UnitGain(Module):
    """Learned factors that start at ``start``. They are held times ``held`` / ``start``, which is how large steps are felt.

    forward: () -> factors of the given shape.
    """

    def __init__(self, *shape: int, held: float, start: float = 1.0) -> None:
        super().__init__()
        self.held, self.start = held, start
        self.gain = empty_parameter(*shape)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.constant_(self.gain, self.held)

    def forward(self) -> Float[Tensor, '...']:
        return self.gain * (self.start / self.held)


class GainedActivation(Module):
    """An activation of its input times a learned gain per channel and the root of the width. forward: (… c) -> (… c)."""

    def __init__(self, dim: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.gain = UnitGain(dim, held=1.0)
        self.root = width**0.5
        self.act = activation

    def forward(self, x: Float[Tensor, '... c']) -> Float[Tensor, '... c']:
        out: Tensor = self.act(x * (self.gain() * self.root).to(x.dtype))
        return out
