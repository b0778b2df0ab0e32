"""The methods of a stack for optimizers: matrices for Muon, and corrections of weights after a step."""

from __future__ import annotations

from itertools import chain

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.qk_clip import clip_attentions_
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.feedforward import FeedForward
from x_transformers.layers.parts import StackParts
from x_transformers.layers.plan import ATTENTIONS
from x_transformers.mixers.linear import LinearMixer


class OptimizedStack(StackParts):
    """A stack, as those see it who train it."""

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices that the Muon optimizer is meant for."""
        parts = [module for module in self.modules() if isinstance(module, (Attention, FeedForward, LinearMixer))]
        return list(chain.from_iterable(module.muon_parameters() for module in parts))  # type: ignore[misc]

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Shrink queries and keys of heads whose scores exceeded ``tau``; a layer that ran several times is clipped once.

        ``intermediates`` of a call in which layers ran in the order of ``plan``. Raises ValueError if their number is another.
        """
        attentions = [self.layers[step.layer].inside for step in self.plan.steps() if step.kind in ATTENTIONS]
        clip_attentions_(attentions, intermediates.attn_intermediates or [], tau)
