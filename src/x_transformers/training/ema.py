"""An exponential moving average of the weights, which often evaluates better than the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from x_transformers.module import fill, own_part
from x_transformers.tensor_types import StateDict

WRAPPED = '_checkpoint_wrapped_module.'


class AveragedWeights:
    """``average = decay * average + (1 - decay) * weight`` after every step.

    While few steps have been taken the decay is smaller, ``(1 + steps) / (10 + steps)``, so that the first weights are soon
    forgotten. The averages are kept in float32 beside the model; buffers are the model's own. Parameters of other processes are
    on the meta device, and so are their averages.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        # a wrapper that runs a layer again has a name in front, which its state dict leaves out
        named = ((name.replace(WRAPPED, ''), p) for name, p in model.named_parameters())
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        here = {name: p for name, p in self.parameters.items() if not p.is_meta}
        averages = [own_part(self.averages[name]) for name in here]
        torch._foreach_lerp_(averages, [own_part(p.detach()).float() for p in here.values()], 1 - decay)
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own ones again afterwards."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: StateDict) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, object]:
        return {'steps': self.steps, 'averages': self.averages}

    def load(self, state: dict[str, object]) -> None:
        averages = state['averages']
        if not isinstance(averages, dict) or averages.keys() != self.averages.keys():
            raise ValueError(
                'averages must be those of this model, got other names. Load them into the model that they were saved from.'
            )
        self.steps = int(str(state['steps']))
        for name, average in self.averages.items():
            if not average.is_meta:
                fill(average, averages[name])
