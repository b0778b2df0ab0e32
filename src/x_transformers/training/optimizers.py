"""Which optimiser moves which parameter, and how fast at which step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from x_transformers.training.options import TrainOptions


def decays(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Whether each parameter decays: matrices do; vectors, scalars and embeddings do not."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embedded = {parameter for table in tables for parameter in table.parameters(recurse=False)}
    return {p: p.ndim >= 2 and p not in embedded for p in model.parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, matrices: Iterable[nn.Parameter], options: TrainOptions) -> list[Optimizer]:
    """AdamW for all parameters, or Muon (https://kellerjordan.github.io/posts/muon) for ``matrices`` and AdamW for the rest.

    Each group remembers its highest learning rate as ``peak``.
    """
    decay = decays(model)
    by_muon = {p for p in matrices if p.ndim == 2 and p in decay} if options.optimizer == 'muon' else set()
    rest = [p for p in decay if p not in by_muon]
    groups = [
        {'params': [p for p in rest if decay[p]], 'weight_decay': options.weight_decay},
        {'params': [p for p in rest if not decay[p]], 'weight_decay': 0.0},
    ]
    groups = [group for group in groups if group['params']]
    optimizers: list[Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True))
    if by_muon:
        ordered = [p for p in decay if p in by_muon]
        optimizers.append(
            torch.optim.Muon(
                ordered, lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn='match_rms_adamw'
            )
        )  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak'] = group['lr']
    return optimizers


def lr_share(step: int, options: TrainOptions) -> float:
    """Share of the highest learning rate that step number ``step`` (from 0) takes."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == 'constant':
        return 1.0
    progress = (step - options.warmup + 1) / max(1, options.steps - options.warmup)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == 'cosine' else 1 - progress
    return options.final_lr + (1 - options.final_lr) * falling


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak'] * share
