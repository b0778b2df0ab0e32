"""Units of sharding: the stacks of a model, their layers, and the modules around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from x_transformers.heads import is_tied
from x_transformers.layers.stack import AttentionLayers
from x_transformers.stack_wrapper import StackWrapper


def stacks_of(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, AttentionLayers))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Every layer of every stack, once."""
    return list(dict.fromkeys(layer for stack in stacks_of(model) for layer in stack.layers))


def units(model: nn.Module) -> list[list[nn.Module]]:
    """Modules whose parameters are gathered together: each layer, and for each model the modules around its stack.

    The table of tokens, the final norm and the head are one unit: a tied head reads the table. A module that several models
    share belongs to the unit of the whole model.
    """
    found: list[list[nn.Module]] = [[layer] for layer in layers_of(model)]
    taken = {module for layer in layers_of(model) for module in layer.modules()}
    ends = [ends_of(module) for module in model.modules() if isinstance(module, StackWrapper)]
    inside = [[each for part in parts for each in part.modules()] for parts in ends]
    for index, parts in enumerate(ends):
        others = {each for other, modules in enumerate(inside) if other != index for each in modules}
        own = [part for part in parts if not taken.intersection(part.modules())]
        if own and not others.intersection(inside[index]):
            found.append(own)
    return found


def ends_of(model: nn.Module) -> list[nn.Module]:
    stack = getattr(model, 'attn_layers', None)
    parts = (getattr(model, 'token_emb', None), getattr(stack, 'final_norm', None), getattr(model, 'to_logits', None))
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return list(dict.fromkeys(part for part in modules if next(part.parameters(), None) is not None or is_tied(part)))
