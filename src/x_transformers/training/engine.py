"""The training engine for one process and one device. Other engines (several processes) replace its methods, not the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.tensor_types import Float, Shaped, StateDict
from x_transformers.training.checkpoint import Checkpoints, load_checkpoint


class Engine:
    """One process. The loop in ``trainer.py`` asks an engine for whatever differs between one process and several."""

    rank: int = 0  # among those that read different data
    world_size: int = 1  # how many read different data
    averages: int = 1  # over how many gradients are averaged
    repeats: int = 1  # how often ``total`` counts what was read once
    is_main: bool = True  # writes files and reports
    devices: int = 1  # that work on one step
    device: torch.device | None = None  # where steps run; None: where the model is

    def build(self, make: Callable[[], nn.Module], device: torch.device, seed: int) -> nn.Module:
        """The model on its device. The generators are seeded with ``seed`` before."""
        return make().to(device)

    def forward(self, model: nn.Module, compiled: bool) -> Callable[..., Any]:
        """What a training step calls."""
        if not compiled:
            return model
        forward: Callable[..., Any] = torch.compile(model)
        return forward

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error says that another process is gone, or does not answer."""
        return False

    def begin_step(self, seed: int, step: int) -> None:
        """Before anything of a step is drawn. One process goes on with its generators."""

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; only after the last one must gradients agree."""
        return nullcontext()

    def gradients(
        self, loss: Callable[[Any], Float[Tensor, '']], batches: Sequence[Any], shares: Sequence[float]
    ) -> list[Tensor]:
        """Forward and backward of the micro-batches of a step; what each adds to the loss, its mean times its share."""
        parts = []
        for micro, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            if share == 0 and self.averages == 1:
                continue  # nothing to predict: its mean would be no number
            with self.accumulating(last=micro + 1 == len(batches)):
                mean = loss(batch)
                # gradients are averaged over processes
                (mean * (share * self.averages)).backward()
            parts.append(mean.detach() * share)
        return parts

    def total(self, value: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
        """The sum of a small tensor over all processes that read different data."""
        return value

    def agree(self, number: int) -> int:
        """The largest of the numbers of all processes: a signal that reached one stops all."""
        return number

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Float[Tensor, '']:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: Iterable[nn.Parameter], most: float, norm: Float[Tensor, '']) -> None:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), most, norm)

    def flops(self, count: Callable[[], float]) -> float:
        """What ``count`` finds when it runs the model, as all processes do together."""
        return count()

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict of the model, as ``load_model`` takes it."""
        return model.state_dict()

    def load_model(self, model: nn.Module, state: StateDict) -> None:
        model.load_state_dict(state)

    def optimizer_state(self, model: nn.Module, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in optimizers]

    def load_optimizers(self, model: nn.Module, optimizers: list[Optimizer], states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def store(self, run: Path, keep: int = 1) -> Any:
        """Writes the checkpoints of a run folder."""
        return Checkpoints(run, keep)

    def read(self, path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """(step, weights, state) of a checkpoint, for ``Trainer.resume``."""
        return load_checkpoint(path)

    def main_first(self) -> AbstractContextManager[Any]:
        """Inside, the main process comes first, and the others find what it has made."""
        return nullcontext()

    def barrier(self) -> None:
        """Wait for the other processes."""
