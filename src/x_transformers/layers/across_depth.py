"""Connections across layers: mixtures of all earlier layers, U-Net skips, the input again at every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.helpers import Sequential
from x_transformers.module import ConstantLinear, Module, empty_parameter, fill
from x_transformers.norms import RMSNorm, rms_norm
from x_transformers.tensor_types import Float


class DynamicLIMe(Module):
    """Layer-integrated memory with weights that depend on the token, https://arxiv.org/abs/2502.09245.

    forward: x (b n d) and the inputs of ``num_layers`` layers so far, its own last -> their weighted sum (b n d), or one for
    each of ``num_views`` views (v b n d). ``use_softmax=False`` takes relu instead. Raises ValueError on another number of
    inputs.
    """

    def __init__(self, dim: int, num_layers: int, num_views: int = 1, norm: bool = True, use_softmax: bool = True) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_views = num_views
        self.multiple_views = num_views > 1
        self.to_weights = Sequential(
            RMSNorm(dim) if norm else None,
            nn.Linear(dim, num_views * num_layers),
            nn.Unflatten(-1, (num_views, num_layers)),
            nn.Softmax(dim=-1) if use_softmax else nn.ReLU(),
        )

    def forward(
        self, x: Float[Tensor, 'b n d'], hiddens: Sequence[Float[Tensor, 'b n d']] | Float[Tensor, 'l b n d']
    ) -> Tensor:
        if len(hiddens) != self.num_layers:
            raise ValueError(
                f'hiddens must be the inputs of {self.num_layers} layers, got {len(hiddens)}. Pass those of all layers so far.'
            )
        stacked = hiddens if isinstance(hiddens, Tensor) else torch.stack(tuple(hiddens))
        mixed = torch.einsum('b n v l, l b n d -> v b n d', self.to_weights(x), stacked)
        return mixed if self.multiple_views else mixed[0]


class LowRankLinear(Module):
    """A linear map of low rank that starts at zero; ``activation`` between its halves. forward: (… d) -> (… e)."""

    def __init__(self, dim: int, dim_out: int, rank: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.activation = deepcopy(activation)
        self.up = ConstantLinear(rank, dim_out, bias=False)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... e']:
        narrow = self.down(x)
        out: Tensor = self.up(narrow if self.activation is None else self.activation(narrow))
        return out


class DepthNorm(nn.RMSNorm):
    """The RMS norm of torch, by its keys and numbers, also where autocast gives it another precision than its weight."""

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


class AggregatedResiduals(Module):
    """What entered all layers so far, mixed by attention over depth, https://arxiv.org/abs/2603.15031.

    Each layer's input is a key; the query comes from this layer's own input, with a correction of low rank. forward: x (b n d)
    and the inputs of any number of layers, its own last -> (b n d), or ``num_views`` mixtures (v b n d).
    """

    def __init__(self, dim: int, num_views: int = 1, lora_rank: int = 64, lora_activation: nn.Module | None = None) -> None:
        super().__init__()
        self.num_views = num_views
        self.to_keys = DepthNorm(dim)
        self.to_query = nn.Sequential(DepthNorm(dim), LowRankLinear(dim, dim * num_views, lora_rank, lora_activation))
        self.norm = DepthNorm(dim)

    def forward(
        self, x: Float[Tensor, 'b n d'], hiddens: Sequence[Float[Tensor, 'b n d']] | Float[Tensor, 'l b n d']
    ) -> Tensor:
        stacked = hiddens if isinstance(hiddens, Tensor) else torch.stack(tuple(hiddens))
        query = self.norm(x.unsqueeze(-2) + self.to_query(x).unflatten(-1, (self.num_views, -1)))
        scores = torch.einsum('b n v d, l b n d -> v b n l', query, self.to_keys(stacked)) * x.shape[-1] ** -0.5
        mixed = torch.einsum('v b n l, l b n d -> v b n d', scores.softmax(dim=-1), stacked)
        return mixed if self.num_views > 1 else mixed[0]


class MultiwayDense(Module):
    """Multiway dynamic dense connections, https://arxiv.org/abs/2502.12170: mixtures of all blocks so far.

    The weights of each of ``ways`` mixtures are ``GELU(norm(x) W_1) W_2 + a``, made of the newest; they start as ``a``: the
    newest alone. forward: the newest (b n d) and all ``count`` of them, it last -> (w b n d).
    """

    def __init__(self, dim: int, count: int, ways: int) -> None:
        super().__init__()
        self.ways, self.count = ways, count
        self.to_weights = nn.Sequential(nn.Linear(dim, ways * count, bias=False), nn.GELU())
        self.mix = ConstantLinear(ways * count, ways * count, bias=False)
        self.static = empty_parameter(ways, count)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        newest = torch.zeros(self.ways, self.count)
        newest[:, -1] = 1.0
        fill(self.static, newest)

    def forward(self, x: Float[Tensor, 'b n d'], hiddens: Sequence[Float[Tensor, 'b n d']]) -> Float[Tensor, 'w b n d']:
        weights = self.mix(self.to_weights(rms_norm(x))).unflatten(-1, (self.ways, self.count)) + self.static
        return torch.einsum('b n w l, l b n d -> w b n d', weights.to(x.dtype), torch.stack(tuple(hiddens)))


def between(mixtures: nn.ModuleList | None, stream: Float[Tensor, '... n d'], carry: Any) -> Tensor:
    """What leaves a block, as it enters the next: with ``mixtures`` one of all so far; ``carry`` has its attention's.

    Behind the last block there is one mixture, in front of the first none.
    """
    if mixtures is None:
        return stream
    carry.blocks.append(stream)
    count = len(carry.blocks)
    mixed = mixtures[count - 2](stream, carry.blocks) if count > 1 else stream.unsqueeze(0)
    carry.views = mixed[:3] if len(mixed) > 1 else None
    out: Tensor = mixed[-1]
    return out


class StreamLambdas(Module):
    """What enters layer l: ``residual[l] * stream + embed[l] * first``, with learned numbers that start as given.

    From modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt) and nanochat; there a layer is a whole block.
    forward: streams (… n d), the stack's normed input as the streams need it, and the layer's index -> (… n d).
    """

    def __init__(self, residual: Sequence[float] | None, embed: Sequence[float] | None) -> None:
        super().__init__()
        self.starts = {'residual': residual, 'embed': embed}
        self.residual = None if residual is None else empty_parameter(len(residual))
        self.embed = None if embed is None else empty_parameter(len(embed))
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        for name, start in self.starts.items():
            if start is not None:
                fill(getattr(self, name), torch.tensor(start))

    def forward(self, streams: Float[Tensor, '... n d'], first: Float[Tensor, '... n d'], layer: int) -> Tensor:
        if self.residual is not None:
            streams = streams * self.residual[layer]
        return streams if self.embed is None else streams + first * self.embed[layer]


class ConcatCombine(Module):
    """A U-Net's skip, https://arxiv.org/abs/1505.04597: one linear map of an earlier stream beside this one.

    forward: x (… n d) and earlier streams, of which number ``prev_layer_ind`` is taken -> (… n d).
    """

    def __init__(self, dim: int, prev_layer_ind: int) -> None:
        super().__init__()
        self.prev_layer_ind = prev_layer_ind
        self.combine = nn.Linear(dim * 2, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, '... n d'],
        prev_layers: Sequence[Float[Tensor, '... n d']] | Mapping[int, Float[Tensor, '... n d']],
    ) -> Tensor:
        out: Tensor = self.combine(torch.cat((prev_layers[self.prev_layer_ind], x), dim=-1))
        return out


def injection(
    x: Float[Tensor, 'b n d'],
    in_attn_cond: Float[Tensor, 'b #n d'] | None,
    proj: nn.Module | None,
    gate: nn.Module | None,
) -> Float[Tensor, 'b #n d'] | None:
    """What is added to every branch's input: the stack's own input, projected, or the caller's condition.

    The learned gate depends on the stack's input. https://arxiv.org/abs/1909.01377, https://arxiv.org/abs/2410.03020,
    https://arxiv.org/abs/2105.04090
    """
    added = in_attn_cond if proj is None else proj(x)
    if added is None or gate is None:
        return added
    out: Tensor = added * gate(x).sigmoid()
    return out
