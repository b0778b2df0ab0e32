"""A residual that scales the mean over time and the deviation from it separately, https://arxiv.org/abs/2605.06169."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.layers.residual import ResidualPath
from x_transformers.module import ConstantLinear, empty_parameter
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.plan import LayerSpec


class MVSplitResidual(ResidualPath):
    """``r + (x - mean(x)) * beta + (mean(x) - mean(r)) * alpha``, with means over the tokens of each row.

    In a causal stack a token's mean is that of the tokens so far, whose sums the cache keeps. ``learned``: both factors are
    linear maps of the branch's mean.
    """

    name = 'mv_split_residual'
    looks_around = True

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> MVSplitResidual:
        return cls(flags.dim, **flags.residual_fn_kwargs)

    def __init__(
        self,
        dim: int,
        *,
        init_alpha: float = 0.0,
        init_beta: float = 0.03,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.init_alpha, self.init_beta = init_alpha, init_beta
        self.to_alpha = ConstantLinear(dim, dim, bias_value=init_alpha) if learned else None
        self.to_beta = ConstantLinear(dim, dim, bias_value=init_beta) if learned else None
        self.alpha = None if learned else empty_parameter(dim)
        self.beta = None if learned else empty_parameter(dim)
        self.init_own()

    def init_own(self) -> None:
        if self.alpha is not None and self.beta is not None:
            nn.init.constant_(self.alpha, self.init_alpha)
            nn.init.constant_(self.beta, self.init_beta)

    def read(self, streams: Float[Tensor, 'b n d']) -> tuple[Tensor, Tensor]:
        return streams, streams

    def forward(
        self, x: Float[Tensor, 'b n d'], residual: Float[Tensor, 'b n d'], *, around: Any = None, **kwargs: Any
    ) -> Tensor:
        tokens, past = (None, None) if around is None else (around.tokens, around.inputs.past)
        mean, rest_mean = self.means(torch.cat((x, residual), dim=-1), tokens, past).chunk(2, dim=-1)
        alpha: Any = self.alpha if self.to_alpha is None else self.to_alpha(mean)
        beta: Any = self.beta if self.to_beta is None else self.to_beta(mean)
        written: Tensor = residual + (x - mean) * beta + (mean - rest_mean) * alpha
        return written

    def means(self, both: Float[Tensor, 'b n e'], tokens: Bool[Tensor, 'b n'] | None, past: Any) -> Float[Tensor, 'b #n e']:
        counted = both.new_ones(*both.shape[:2], 1) if tokens is None else tokens.unsqueeze(-1).to(both.dtype)
        sums = torch.cat((both * counted, counted), dim=-1)
        if not self.is_causal:
            sums = sums.sum(dim=1, keepdim=True)
        else:
            sums = sums.cumsum(dim=1)
            if past is not None:
                before = past.get('sums')
                if before is not None:
                    sums = sums + past.newest(before, 1, 0)
                past.extend(sums=sums)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1.0)
