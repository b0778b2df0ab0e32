"""Shared by objectives on latents: rollouts, their weights, a frozen head, and a regularizer of distributions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from x_transformers.embedding.ids import token_ids
from x_transformers.heads import TiedHead
from x_transformers.module import ConstantLinear
from x_transformers.tensor_types import Bool, Float, Int

SIGREG_KWARGS = {'num_slices': 1024, 'domain': (-5.0, 5.0), 'num_knots': 17}


def check_parameters(where: str, *broken: str | bool) -> None:
    """Raise one ValueError with a sentence for each thing that is wrong."""
    sentences = [sentence for sentence in broken if isinstance(sentence, str)]
    if sentences:
        raise ValueError(f'{where}: ' + ' '.join(sentences))


def rollout_inputs(
    x: Int[Tensor, 'b n'], rollouts: int, ignore_index: int, pad_value: int
) -> tuple[Int[Tensor, 'b n'], Int[Tensor, 'b n'], Bool[Tensor, 'b n']]:
    """(the ids, what the net reads, which of them count); ValueError if they are too short to look that far ahead."""
    if x.ndim != 2 or x.shape[1] <= rollouts + 1:
        raise ValueError(
            f'x must be token ids (batch, more than {rollouts + 1} tokens), as num_rollouts={rollouts} looks that far ahead, '
            f'got shape {tuple(x.shape)}. Give longer sequences, or predict fewer positions.'
        )
    x = token_ids(x)
    valid = x != ignore_index
    return x, x.masked_fill(~valid, pad_value), valid


def masked_average(t: Float[Tensor, 'b n ...'], mask: Bool[Tensor, 'b n'] | None) -> Float[Tensor, '']:
    """Mean over the entries that the mask names; 0 if it names none."""
    if mask is None:
        return t.mean()
    mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim)).expand(t.shape)
    return t.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def normalized_weights(weights: Sequence[float] | None, count: int, name: str) -> tuple[float, ...]:
    """One weight per rollout, which add up to 1; equal ones unless given."""
    weights = (1.0,) * count if weights is None else tuple(weights)
    total = sum(weights)
    if len(weights) != count or any(weight < 0 for weight in weights) or not total > 0:
        raise ValueError(f'{name} must be {count} numbers of at least 0, one per rollout, not all 0; got {weights}.')
    return tuple(weight / total for weight in weights)


class Discount:
    """Weights exp(-decay * sum of max(0, earlier loss - threshold)): what follows a bad prediction counts less.

    Losses are detached. ``after(loss)`` adds one; ``weight`` is that of the next. https://arxiv.org/abs/2511.05963
    """

    def __init__(self, decay: float, threshold: float = 0.0) -> None:
        self.decay, self.threshold = decay, threshold
        self.total: Tensor | None = None

    def add(self, loss: Float[Tensor, '...']) -> None:
        excess = (loss.detach() - self.threshold).clamp(min=0.0)
        self.total = excess if self.total is None else self._cut(excess) + excess

    def weight(self, like: Float[Tensor, '...']) -> Tensor:
        """For a loss shaped as ``like``: of shape () or (b n), n at most that of the losses before."""
        if self.total is None:
            return torch.ones_like(like)
        weight: Tensor = (-self.decay * self._cut(like)).exp()
        return weight

    def _cut(self, like: Float[Tensor, '...']) -> Tensor:
        total: Any = self.total
        cut: Tensor = total[:, : like.shape[1]] if like.ndim else total
        return cut


def frozen_logits(net: Any, hidden: Float[Tensor, '... d']) -> Float[Tensor, '... v']:
    """The logits of ``net``'s head, through which gradients reach ``hidden`` but no parameter."""

    def head(x: Float[Tensor, '... d'], **kwargs: Any) -> Any:
        module: Any = net.to_logits
        if isinstance(module, TiedHead):
            return F.linear(x, module.weight.detach())
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return functional_call(module, parameters, (x,), kwargs)

    form = getattr(net, 'head_form', None)
    logits: Tensor = head(hidden) if form is None else form(head, hidden, None, {})
    return logits


def mlp(dims: Sequence[int], activation: type[nn.Module] = nn.GELU, zero_last: bool = False) -> nn.Sequential:
    """Linear maps between widths, with an activation between each two; the last may start at zero."""
    layers: list[nn.Module] = []
    for index, (dim_in, dim_out) in enumerate(pairwise(dims)):
        last = index == len(dims) - 2
        layers.append(ConstantLinear(dim_in, dim_out) if last and zero_last else nn.Linear(dim_in, dim_out))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


def sigreg(
    x: Float[Tensor, 'b n d'],
    mask: Bool[Tensor, 'b n'] | None = None,
    num_slices: int = 1024,
    domain: tuple[float, float] = (-5.0, 5.0),
    num_knots: int = 17,
) -> Float[Tensor, '']:
    """Distance of the embeddings' distribution from a standard normal one, along random directions.

    For each of ``num_slices`` unit directions u the empirical characteristic function of <x, u> is compared with exp(-t^2/2)
    at ``num_knots`` points of ``domain``, weighted by exp(-t^2/2) and integrated by the trapezoidal rule (Epps-Pulley,
    https://arxiv.org/abs/2511.08544).
    """
    rows = x.flatten(0, -2) if mask is None else x[mask]
    directions = F.normalize(torch.randn(x.shape[-1], num_slices, device=x.device, dtype=torch.float32), dim=0)
    knots = torch.linspace(*domain, num_knots, device=x.device)
    normal = (-0.5 * knots.square()).exp()
    angles = (rows.float() @ directions).unsqueeze(-1) * knots
    real, imaginary = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
    distance = ((real - normal).square() + imaginary.square()) * normal
    return torch.trapezoid(distance, knots, dim=-1).mean()
