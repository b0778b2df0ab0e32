"""Paired initial values: two models share those of every parameter with the same name and shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from x_transformers.evidence.draws import generator, seed_of
from x_transformers.module import Module

# in-place draws of torch that take a generator; what is not listed draws from the global one, seeded per module
FILLS = frozenset({
    'normal_', 'uniform_', 'random_', 'bernoulli_', 'exponential_', 'geometric_', 'log_normal_', 'cauchy_',
})  # fmt: skip


class NamedFills(TorchFunctionMode):
    """Random fills of a known tensor draw from a generator of its own."""

    def __init__(self, generators: dict[int, torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, '__name__', '') in FILLS and args and isinstance(args[0], Tensor):
            own = self.generators.get(id(args[0]))
            if own is not None and kwargs.get('generator') is None:
                kwargs['generator'] = own
        return func(*args, **kwargs)


def fill_by_name(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, from generators seeded by ``seed`` and its name.

    A module that can fill itself does so (``init_own`` of ours, ``reset_parameters`` of others); what cannot keeps its values.
    The order in which modules are made, and modules that an idea adds, change nothing for the others.
    """
    state = torch.get_rng_state()
    named = {id(p): generator('parameter', seed, name) for name, p in model.named_parameters() if p.device.type == 'cpu'}
    try:
        with torch.no_grad(), NamedFills(named):
            fill_module(model, '', seed, set())
    finally:
        torch.set_rng_state(state)


def fill_module(module: nn.Module, name: str, seed: int, done: set[int]) -> None:
    """Children first: a parent may read what they hold, but changes nothing in them."""
    if id(module) in done:
        return
    done.add(id(module))
    ours = isinstance(module, Module) and type(module).reset_parameters is Module.reset_parameters
    own = module.init_own if isinstance(module, Module) and ours else getattr(module, 'reset_parameters', None)
    if ours or own is None:
        for child_name, child in module.named_children():
            fill_module(child, f'{name}.{child_name}' if name else child_name, seed, done)
    if own is not None:
        torch.manual_seed(seed_of('module', seed, name))
        own()
