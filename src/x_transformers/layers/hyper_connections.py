"""Several residual streams, read and written through learned, input-dependent weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.layers.residual import ResidualPath
from x_transformers.layers.stream_steps import normed_products, read_streams, write_streams
from x_transformers.module import empty_parameter, fill, untouched
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.plan import LayerSpec

Rest = tuple[Tensor, Tensor]


def sinkhorn(t: Float[Tensor, '... i j'], iters: int = 20) -> Float[Tensor, '... i j']:
    """Doubly stochastic matrices: softmax over the rows, then both axes made to sum to 1 in turn, ``iters`` times.

    Computed in float32 (float64 stays), returned in the dtype of ``t``; https://arxiv.org/abs/2512.24880.
    """
    dtype = t.dtype
    t = t.to(torch.promote_types(dtype, torch.float32)).softmax(dim=-2)
    for _ in range(iters):
        t = F.normalize(t, p=1.0, dim=-1)
        t = F.normalize(t, p=1.0, dim=-2)
    return t.to(dtype)


class HyperConnection(ResidualPath):
    """One layer's weights over ``num_residual_streams`` streams, https://arxiv.org/abs/2409.19606.

    read: (b s) n d -> the branch's input b n d, or ``num_input_views`` of them, v b n d. write: b n d -> (b s) n d.

    Between layers every stream becomes a mixture of all. The original means the mixing matrix to be doubly stochastic but
    normalizes an axis of size 1, so all its entries are 1; checkpoints rely on it and it is the default.
    ``doubly_stochastic=True`` makes the matrix what it was meant to be.
    """

    name = 'num_residual_streams'

    @classmethod
    def is_on(cls, flags: StackFlags) -> bool:
        return flags.num_residual_streams > 1

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> ResidualPath:
        settings = {
            'layer_index': spec.index,
            'num_residual_streams': flags.num_residual_streams,
            'num_input_views': 1 if flags.mixes_layers else spec.views,
            'sinkhorn_iters': flags.hyper_conn_sinkhorn_iters,
            'doubly_stochastic': flags.hyper_conn_doubly_stochastic,
        }
        return cls(flags.dim, **{**settings, **flags.residual_fn_kwargs})

    def __init__(
        self,
        dim: int,
        *,
        layer_index: int,
        num_residual_streams: int,
        num_input_views: int = 1,
        sinkhorn_iters: int = 5,
        doubly_stochastic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_residual_streams = streams = num_residual_streams
        self.num_input_views = views = num_input_views
        self.layer_index = layer_index
        self.sinkhorn_iters = sinkhorn_iters
        self.doubly_stochastic = doubly_stochastic
        self.norm = nn.LayerNorm(dim, bias=False)
        self.static_beta = empty_parameter(streams)
        self.static_alpha = empty_parameter(streams, views + streams)
        self.dynamic_alpha_fn = empty_parameter(dim, streams + views)
        self.dynamic_alpha_scale = empty_parameter()
        self.dynamic_beta_fn = empty_parameter(dim)
        self.dynamic_beta_scale = empty_parameter()
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        views, streams = self.num_input_views, self.num_residual_streams
        nn.init.ones_(self.static_beta)
        # at first each layer listens mostly to one stream, and every stream keeps to itself
        start = torch.zeros(self.static_alpha.shape, device=self.static_alpha.device)
        start[self.layer_index % streams, :views] = 1.0
        start[:, views:].fill_diagonal_(1.0)
        fill(self.static_alpha, start)
        nn.init.zeros_(self.dynamic_alpha_fn)
        nn.init.constant_(self.dynamic_alpha_scale, 0.01)
        nn.init.zeros_(self.dynamic_beta_fn)
        nn.init.constant_(self.dynamic_beta_scale, 0.01)

    def read(self, streams: Float[Tensor, '(b s) n d']) -> tuple[Tensor, Rest]:
        views = self.num_input_views
        separate = streams.unflatten(0, (-1, self.num_residual_streams))
        # the columns that mix streams are only computed where they are used; then the last one, of what is written
        used = self.dynamic_alpha_fn if self.doubly_stochastic else self.dynamic_alpha_fn[:, :views]
        weights = torch.cat((used, self.dynamic_beta_fn.unsqueeze(-1)), dim=-1)
        products = self._normed_products(separate, weights)
        static = self.static_alpha[:, : used.shape[1]].unsqueeze(1)
        alpha = static + self.dynamic_alpha_scale * products[..., :-1]
        beta = 2 * (self.static_beta.unsqueeze(-1) + self.dynamic_beta_scale * 2 * products[..., -1].sigmoid()).sigmoid()
        shares = alpha[..., :views].sigmoid()
        if views == 1 and not self.doubly_stochastic:
            read, total = read_streams(separate, shares.squeeze(-1))
            return read, (total.unsqueeze(1), beta)
        read = torch.einsum('b s n v, b s n d -> v b n d', shares, separate)
        carried = self._mixed(separate, alpha[..., views:])
        return (read[0] if views == 1 else read), (carried, beta)

    def _normed_products(self, separate: Float[Tensor, 'b s n d'], weights: Float[Tensor, 'd c']) -> Float[Tensor, 'b s n c']:
        norm = self.norm
        if not untouched(norm, nn.LayerNorm):
            products: Tensor = norm(separate) @ weights
            return products
        return normed_products(separate, norm.weight, weights, norm.eps)

    def _mixed(self, separate: Float[Tensor, 'b s n d'], alpha: Float[Tensor, 'b s n t']) -> Float[Tensor, 'b #s n d']:
        """What each stream carries on."""
        if not self.doubly_stochastic:
            return separate.sum(dim=1, keepdim=True)
        matrix = sinkhorn(alpha.transpose(1, 2), self.sinkhorn_iters)
        return torch.einsum('b n s t, b s n d -> b t n d', matrix, separate)

    def write(self, out: Float[Tensor, 'b n d'], rest: Rest) -> Float[Tensor, '(b s) n d']:
        mixed, beta = rest
        return write_streams(mixed, beta, out).flatten(0, 1)

    def prepare(self, residual: Float[Tensor, '(b s) n d']) -> tuple[Tensor, Tensor, dict[str, Any]]:
        branch_input, (mixed, beta) = self.read(residual)
        count = self.num_residual_streams
        return branch_input, mixed.expand(-1, count, -1, -1).flatten(0, 1), {'beta': beta}

    def forward(
        self,
        x: Float[Tensor, 'b n d'],
        residual: Rest | Float[Tensor, '(b s) n d'],
        *,
        beta: Float[Tensor, 'b s n'] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, '(b s) n d']:
        """``residual``: what ``read`` left over, or what ``prepare`` did, whose weights are ``beta``."""
        if isinstance(residual, tuple):
            return self.write(x, residual)
        if beta is None:
            raise ValueError(
                'beta must be given to HyperConnection, which writes with the weights that it read with. Pass the one from '
                'prepare().'
            )
        return self.write(x, (residual.unflatten(0, (-1, self.num_residual_streams)), beta))
