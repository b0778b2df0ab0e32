"""Differential attention: the difference of two softmaxes, which cancels their common noise.

https://arxiv.org/abs/2410.05258
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.helpers import single
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.flags.attention import AttentionFlags

# where no layer of a stack says how deep it is: the first
FIRST = 0.2
EPS = 1e-5


def paired_values(values: Float[Tensor, 'b kh j e'], copies: int = 2) -> Float[Tensor, 'b kh j (2 e)']:
    """Both heads of a pair have the values of both, side by side."""
    both = torch.cat((values[:, ::2], values[:, 1::2]), dim=-1)
    return both.repeat_interleave(copies, dim=1)


class Differential(Module):
    """What a pair of heads gives: norm(first - λ · second) · (1 - λ_init), laid out as two heads of the usual width.

    λ = exp(λ_q1 · λ_k1) - exp(λ_q2 · λ_k2) + λ_init is one number for all pairs of a layer; so are the gains of the norm.
    """

    def __init__(self, dim_head: int, value_dim: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.lambda_q1, self.lambda_k1 = empty_parameter(dim_head), empty_parameter(dim_head)
        self.lambda_q2, self.lambda_k2 = empty_parameter(dim_head), empty_parameter(dim_head)
        self.gain = empty_parameter(2 * value_dim)
        self.init_own()

    @classmethod
    def from_flags(cls, flags: AttentionFlags) -> Differential | None:
        if not flags.differential:
            return None
        start = flags.differential_lambda_init
        return cls(flags.dim_head, flags.value_dim, FIRST if start is None else start)

    @torch.no_grad()
    def init_own(self) -> None:
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)
        nn.init.ones_(self.gain)

    def factor(self) -> Float[Tensor, '']:
        """λ, in single precision or better."""
        first, second = (
            (single(q) * single(k)).sum().exp() for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        return first - second + self.lambda_init

    def forward(self, out: Float[Tensor, 'b h i (2 e)']) -> Float[Tensor, 'b h i e']:
        wide = single(out)
        difference = wide[:, ::2] - self.factor() * wide[:, 1::2]
        normed = F.rms_norm(difference, self.gain.shape, single(self.gain), EPS) * (1 - self.lambda_init)
        # (b p i 2 e) as heads 2 p and 2 p + 1
        heads: Tensor = normed.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)
        return heads.to(out.dtype)
