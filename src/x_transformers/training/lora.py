"""Low-rank adaptation (https://arxiv.org/abs/2106.09685): only a low-rank change of each linear map is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from x_transformers.tensor_types import Float
from x_transformers.training.errors import TrainingError


class LoRAWeight(nn.Module):
    """``weight + up @ down``; ``up`` starts at 0, so that the model starts as it was."""

    decayed_parameters = ('down', 'up')

    def __init__(self, weight: Float[Tensor, 'o i'], rank: int) -> None:
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(torch.randn(rank, into, dtype=weight.dtype, device=weight.device) / into**0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Float[Tensor, 'o i']) -> Float[Tensor, 'o i']:
        return weight + self.up @ self.down


def add_lora(model: nn.Module, rank: int) -> int:
    """Freeze the model and give every linear map of its layers a change of that rank; how many got one.

    Errors: ``TrainingError`` if there is no linear map.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    net = getattr(model, 'net', model)
    layers = getattr(net, 'attn_layers', net)
    maps = [module for module in layers.modules() if isinstance(module, nn.Linear) and min(module.weight.shape) > rank]
    if not maps:
        raise TrainingError(f'--lora must be below the width of the linear maps, got {rank}.')
    for module in maps:
        parametrize.register_parametrization(module, 'weight', LoRAWeight(module.weight, rank))
    return len(maps)


def merged(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict of the model with its changes added to the weights, under the names it had without them."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, 'weight'):
            prefix = f'{name}.' if name else ''
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f'{prefix}parametrizations.weight.')}
            state[f'{prefix}weight'] = module.weight.detach()
    return state
