"""Pipeline stages: the layers and parameters of each, and the models that cannot be split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.embedding.token import TokenEmbedding
from x_transformers.heads import is_tied
from x_transformers.layers.plan import Step
from x_transformers.layers.stack import AttentionLayers
from x_transformers.transformer_wrapper import TransformerWrapper


def staged_refusals(model: nn.Module, stages: int) -> Iterator[str]:
    """One sentence for each property of a model, other than flags, that prevents splitting it into stages."""
    net = network(model)
    if net is None:
        yield (
            'a model must be a TransformerWrapper, or AutoregressiveWrapper of one, with --pipeline, got '
            f'{type(model).__name__}. Use --shard full.'
        )
        return
    blocks = len(blocks_of_stages(net.attn_layers))
    if stages > blocks:
        yield f'--pipeline must be at most {blocks}, the number of blocks of layers, got {stages}. Give fewer, or more depth.'


def network(model: nn.Module) -> Any:
    """The TransformerWrapper of a model whose loss stages can compute; None for other models."""
    net = model.net if isinstance(model, AutoregressiveWrapper) else model
    return net if type(net) is TransformerWrapper else None


def blocks_of_stages(stack: AttentionLayers) -> list[list[Step]]:
    """The steps of each executed block."""
    blocks: list[list[Step]] = []
    for step in stack.plan.own_steps:
        if step.block:
            blocks.append([])
        blocks[-1].append(step)
    return blocks


def steps_of(stack: AttentionLayers, stages: int) -> list[tuple[Step, ...]]:
    """The steps of each stage: equally many blocks, with the remainder in the first stages."""
    blocks = blocks_of_stages(stack)
    borders = [-(-len(blocks) * stage // stages) for stage in range(stages + 1)]
    return [tuple(step for block in blocks[a:b] for step in block) for a, b in pairwise(borders)]


# the stages of parameters


def placed_modules(net: Any, stages: int) -> dict[nn.Module, set[int]]:
    """The stages of modules that only some stages hold: layers, the token table, and all that follows the last layer."""
    stack, last = net.attn_layers, stages - 1
    placed: dict[nn.Module, set[int]] = {}
    for stage, steps in enumerate(steps_of(stack, stages)):
        for step in steps:
            placed.setdefault(stack.layers[step.layer], set()).add(stage)
    for layer in stack.layers:
        # a layer that is never executed belongs to the first stage
        placed.setdefault(layer, {0})
    placed[stack.final_norm] = {last}
    if isinstance(net.to_logits, nn.Module):
        placed[net.to_logits] = {last}
    if type(net.token_emb) is TokenEmbedding:
        tied = isinstance(net.to_logits, nn.Module) and any(map(is_tied, net.to_logits.modules()))
        placed[net.token_emb] = {0, last} if tied else {0}
    return placed


def stages_of_modules(model: nn.Module, net: Any, stages: int) -> dict[nn.Module, set[int]]:
    """The stages of every module. Modules outside of the layers are on all stages."""
    placed = placed_modules(net, stages)
    where: dict[nn.Module, set[int]] = {}

    def visit(module: nn.Module, at: set[int]) -> None:
        at = placed.get(module, at)
        where[module] = where.get(module, set()) | at
        for child in module.children():
            visit(child, at)

    visit(model, set(range(stages)))
    return where


def places_of(model: nn.Module, net: Any, stages: int) -> dict[nn.Parameter, set[int]]:
    """The stages of every parameter."""
    places: dict[nn.Parameter, set[int]] = {}
    for module, at in stages_of_modules(model, net, stages).items():
        for parameter in module.parameters(recurse=False):
            places[parameter] = places.get(parameter, set()) | at
    return places


def leave_elsewhere(model: nn.Module, net: Any, stage: int, stages: int) -> dict[nn.Parameter, set[int]]:
    """Move the parameters of other stages to the meta device. Returns the stages of each parameter of the model."""
    where, places = stages_of_modules(model, net, stages), places_of(model, net, stages)
    left = {
        parameter: nn.Parameter(torch.empty_like(parameter, device='meta'), requires_grad=parameter.requires_grad)
        for parameter, at in places.items()
        if stage not in at
    }
    for module, at in where.items():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = left.get(parameter, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer if stage in at else buffer.to('meta')
    return {left.get(parameter, parameter): at for parameter, at in places.items()}
