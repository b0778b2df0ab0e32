"""Utilization: the fraction of a device's peak that a run reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from x_transformers.training.trainer import Callback

if TYPE_CHECKING:
    from x_transformers.training.trainer import Trainer

# dense operations per second in bfloat16, from the vendors' data sheets
PEAKS = {
    'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12,
}  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """What the vendor states for a GPU that is known."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def training_flops(model: nn.Module, batch: Any) -> float:
    """Operations of forward and backward on a batch, which is counted as three forwards; recomputation does not count."""
    mode = model.training
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.train()(batch)
    finally:
        model.train(mode)
    return 3.0 * counter.get_total_flops()


class Utilization(Callback):
    """Adds ``mfu`` to what is told of each step: the share of the peak that the model's operations take."""

    def __init__(self, flops_per_token: float, peak: float) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record['mfu'] = round(record['tokens_per_second'] * self.flops_per_token / self.peak, 4)
