"""The methods of a model for optimizers: matrices for Muon, and corrections of weights after a step."""

from __future__ import annotations

from typing import Any

from torch import nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.feedforward import FeedForward
from x_transformers.module import Module, unit_modules


class OptimizedModel(Module):
    """A model that has its stack in ``attn_layers``."""

    attn_layers: Any

    def balance_experts_(self) -> None:
        """After an optimizer's step, by all processes, with ``ff_router_balance='bias'`` (https://arxiv.org/abs/2408.15664)."""
        for module in self.attn_layers.modules():
            if isinstance(module, FeedForward):
                module.balance_experts_()

    def normalize_weights_(self) -> None:
        """With ``ngpt``: give weights unit length again, after each step of an optimizer (https://arxiv.org/abs/2410.01131)."""
        for module in unit_modules(self):
            module.normalize_()

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Shrink queries and keys whose scores exceeded ``tau`` (https://arxiv.org/abs/2507.20534)."""
        self.attn_layers.attn_qk_clip_(intermediates, tau=tau)

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices that an optimizer for matrices should take."""
        parameters: list[nn.Parameter] = self.attn_layers.muon_parameters()
        return parameters
