"""Optimizers: the parameters of each, weight decay, and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from x_transformers.training.errors import TrainingError
from x_transformers.training.mup import shares
from x_transformers.training.options import TrainerOptions
from x_transformers.training.roles import decays


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """What Muon may move: the parameters that modules name in ``muon_parameters()``, else those of ``nn.Linear``."""
    found: dict[nn.Parameter, None] = {}
    named = False
    covered: set[nn.Module] = set()
    for module in model.modules():  # outermost first
        method = getattr(module, 'muon_parameters', None)
        if module in covered or not callable(method):
            continue
        named = True
        covered.update(module.modules())
        found.update(dict.fromkeys(parameter for parameter in method() if isinstance(parameter, nn.Parameter)))
    if not named:
        linear = (module for module in model.modules() if isinstance(module, nn.Linear))
        found.update((parameter, None) for module in linear for parameter in module.parameters(recurse=False))
    return list(found)


def parameter_groups(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    lr: float,
    weight_decay: float,
    mup: bool = False,
    mup_base: int = 256,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of the kind of Adam: which parameters decay, and at which rate each learns.

    ``parameters``: these only. ``mup``: rates by the rules of the maximal update parametrization, for ``lr`` as it was tuned at
    the width ``mup_base`` (https://arxiv.org/abs/2203.03466); the model should have been through ``training.mup.mup_init_``.
    """
    decay = decays(model)
    rest = [*(decay if parameters is None else parameters)]
    factors = {p: share.lr for p, share in shares(model, mup_base).items()} if mup else dict.fromkeys(rest, 1.0)
    groups = [
        {
            'params': [p for p in rest if decay[p] == its and factors[p] == factor],
            'weight_decay': weight_decay * its,
            'lr': lr * factor,
        }
        for its in (True, False)
        for factor in sorted({factors[p] for p in rest})
    ]
    return [group for group in groups if group['params']]


def make_optimizers(
    model: nn.Module, options: TrainerOptions, matrices: Iterable[nn.Parameter] | None = None
) -> list[Optimizer]:
    """AdamW for all parameters, or Muon (https://kellerjordan.github.io/posts/muon) for ``matrices`` and AdamW for the rest.

    Each group remembers its highest learning rate as ``peak``.
    """
    decay = decays(model)
    if not decay:
        raise TrainingError(
            'the model must have a parameter that requires gradients, got none. Unfreeze what is to be trained.'
        )
    by_muon: set[nn.Parameter] = set()
    if options.optimizer == 'muon':
        given = matrices_of(model) if matrices is None else matrices
        by_muon = {p for p in given if p.ndim == 2 and p in decay}
    rest = [p for p in decay if p not in by_muon]
    groups = parameter_groups(
        model, rest, lr=options.lr, weight_decay=options.weight_decay, mup=options.mup, mup_base=options.mup_base
    )
    betas = (options.beta1, options.beta2)
    optimizers: list[Optimizer] = []
    if groups and options.optimizer == 'sgd':
        optimizers.append(torch.optim.SGD(groups, lr=options.lr, momentum=options.beta1, nesterov=options.beta1 > 0))
    elif groups:
        adamw = spread_kind(torch.optim.AdamW, rest)
        optimizers.append(adamw(groups, lr=options.lr, betas=betas, fused=True))
    if by_muon:
        ordered = [p for p in decay if p in by_muon]
        muon = spread_kind(torch.optim.Muon, ordered)
        optimizers.append(muon(ordered, lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn='match_rms_adamw'))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak'] = group['lr']
    return optimizers


def spread_kind(kind: type[Optimizer], parameters: Iterable[nn.Parameter]) -> Any:
    """PyTorch's own, or for parameters that are spread over processes the one of the same name that knows of it."""
    if any(hasattr(parameter, 'device_mesh') for parameter in parameters):
        from x_transformers.distributed import optimizers

        return getattr(optimizers, kind.__name__)
    return kind


def lr_share(step: int, options: TrainerOptions) -> float:
    """Share of the highest learning rate that step number ``step`` (from 0) takes."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == 'constant':
        return 1.0
    falls_from = options.warmup
    if options.schedule == 'wsd':  # stable, then down over the last share of all steps (https://arxiv.org/abs/2404.06395)
        falls_from = max(falls_from, options.steps - round(options.decay_share * options.steps))
        if step < falls_from:
            return 1.0
    progress = min(1.0, (step - falls_from + 1) / max(1, options.steps - falls_from))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == 'cosine' else 1 - progress
    return options.final_lr + (1 - options.final_lr) * falling


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak'] * share
