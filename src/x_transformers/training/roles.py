"""Roles of parameters: the weight of a linear map, which decays, or a gain, a bias, a table."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

# modules whose weights are linear maps: their other parameters (biases) and all other modules' are gains, norms or tables
LINEAR_MAPS = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def decays(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Whether each trainable parameter decays: the weights of linear maps do.

    Gains, norms, biases, embeddings, memories and other tables do not, whatever their shape: zero is no neutral value for them.
    A table that is also the weight of a linear map (a tied head) is a table. A module with linear maps among its own
    parameters lists their names in ``decayed_parameters``.
    """
    maps: set[nn.Parameter] = set()
    tables: set[nn.Parameter] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            tables.update(own.values())
        elif isinstance(module, LINEAR_MAPS):
            maps.update(parameter for name, parameter in own.items() if 'weight' in name and parameter.ndim >= 2)
        maps.update(own[name] for name in getattr(module, 'decayed_parameters', ()) if name in own)
    return {p: p in maps and p not in tables for p in model.parameters() if p.requires_grad}
