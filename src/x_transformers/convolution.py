"""Canon layers: a causal depthwise convolution over a few tokens, added to its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from x_transformers.helpers import pad_at_dim
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.cache.layer_cache import LayerCache

# the tape of a layer's cache under which a convolution remembers its input begins so
TAPE = 'canon_'


class CausalConvolution(Module):
    """``x_t + Σ_j w_j * x_{t-j}`` over the last ``size`` tokens, channel by channel, https://arxiv.org/abs/2512.17351.

    No activation and no bias. forward: x (… n d); ``tokens`` (b n): which are no padding, as others count as zeros; ``past``:
    the layer's cache, which holds earlier tokens under ``name`` -> (… n d). Views (v b n d) have one convolution.
    """

    def __init__(self, dim: int, name: str, size: int = 4) -> None:
        super().__init__()
        self.name = TAPE + name
        self.size = size
        self.weight = empty_parameter(size, dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)

    def forward(
        self, x: Float[Tensor, '... n d'], tokens: Bool[Tensor, 'b n'] | None = None, past: LayerCache | None = None
    ) -> Float[Tensor, '... n d']:
        n, before = x.shape[-2], self.size - 1
        seen = x if tokens is None else x.masked_fill(~tokens.unsqueeze(-1), 0.0)
        if past is not None:
            # tapes have the batch in front
            has_views = x.ndim == 4
            (whole,) = past.extend(**{self.name: seen.transpose(0, 1) if has_views else seen})
            seen = past.newest(whole, before, n)
            seen = seen.transpose(0, 1) if has_views else seen
        seen = pad_at_dim(seen, (before + n - seen.shape[-2], 0), dim=-2)
        weight = self.weight.to(x.dtype)
        taps = [weight[lag] * seen.narrow(-2, before - lag, n) for lag in range(self.size)]
        return x + torch.stack(taps).sum(dim=0)
