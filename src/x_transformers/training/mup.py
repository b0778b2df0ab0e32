"""Maximal update parametrization, https://arxiv.org/abs/2203.03466: hyperparameters tuned at one width hold at others.

Which axes of a parameter grow with the width is seen by building the same model at the base width, without memory: a stack of
``dim = base`` with heads in proportion, as heads keep their width. At the base width everything is as without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from x_transformers.flags.base import FlagError
from x_transformers.flags.per_layer import PerLayer, per_layer
from x_transformers.layers.stack import AttentionLayers
from x_transformers.position.absolute import AbsolutePositionalEmbedding
from x_transformers.saving.made import Made
from x_transformers.saving.plain import keywords_of
from x_transformers.training.errors import TrainingError
from x_transformers.training.roles import decays


class Share(NamedTuple):
    """Factors of one parameter: on AdamW's learning rate, and on what it starts from."""

    lr: float = 1.0
    init: float = 1.0


def narrower_model(model: nn.Module, base: int) -> nn.Module:
    """The same model with stacks of width ``base``, on the meta device.

    Raises TrainingError if it cannot be built so.
    """
    if not isinstance(model, Made) or not hasattr(model, 'made_with'):
        raise TrainingError(f'model must be made of flags for mup, got {type(model).__name__}. Leave out mup.')
    given = {
        name: narrower_model(value, base) if isinstance(value, Made) else value for name, value in keywords_of(model).items()
    }
    if isinstance(model, AttentionLayers):
        given |= {'dim': base, 'heads': fewer(model.flags.varying.get('heads', model.flags.heads), base, model.dim)}
    try:
        with torch.device('meta'):
            return type(model)(**given)
    except FlagError as error:
        raise TrainingError(f'mup must be able to build the model at the width {base}: {error} Choose another base.') from None


def fewer(heads: Any, base: int, dim: int) -> Any:
    """Heads in proportion to the width."""
    if isinstance(heads, tuple):
        return per_layer([fewer(each, base, dim) for each in heads])
    if isinstance(heads, PerLayer):
        return per_layer([fewer(each, base, dim) for each in heads.values])
    if heads * base % dim:
        raise TrainingError(f'mup must have whole heads at the width {base}, got {heads} heads at {dim}. Choose another base.')
    return heads * base // dim


def shares(model: nn.Module, base: int) -> dict[nn.Parameter, Share]:
    """The factors of each trainable parameter, by the rules for Adam (table 3 of the paper).

    Of a linear map that reads what grows with the width, rates fall with the width; where its output does not grow, it starts
    smaller, too. Tables start, per number, as at the base width. Raises TrainingError for a table that is also the head.
    """
    if any(hasattr(parameter, 'device_mesh') for parameter in model.parameters()):
        raise TrainingError('mup must have whole parameters, got some that are spread over processes. Use one, or copies.')
    names = {name: parameter.shape for name, parameter in narrower_model(model, base).named_parameters()}
    missing = [name for name, _ in model.named_parameters() if name not in names]
    if missing:
        raise TrainingError(
            f'mup must find all parameters at the base width, too, got {", ".join(missing[:3])}. Leave out mup.'
        )
    maps, found = decays(model), {}
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if any(getattr(getattr(module, 'flags', None), 'tie_embedding', False) for module in model.modules()):
        raise TrainingError(
            'mup must have a head of its own, got tie_embedding, whose table would need two rates. Leave that out.'
        )
    places = {module.emb.weight for module in model.modules() if isinstance(module, AbsolutePositionalEmbedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            width = parameter.shape[-1] / names[name][-1] if parameter.ndim else 1.0
            if parameter in tables:
                # positions are multiplied by width ** -0.5 where they are read
                found[parameter] = Share(width**0.5 if parameter in places else 1.0, width**0.5)
            elif maps[parameter] and width != 1.0:
                grows = parameter.shape[0] != names[name][0]
                found[parameter] = Share(1.0 / width, 1.0 if grows else width**-0.5)
            else:
                found[parameter] = Share()
    return found


@torch.no_grad()
def mup_init_(model: nn.Module, base: int) -> None:
    """Let a model that has just been made start as the rules say; once, before anything is loaded or trained."""
    for parameter, share in shares(model, base).items():
        if share.init != 1.0:
            parameter.mul_(share.init)
