"""Rotary positions on a grid, such as that of an image or of a video. https://arxiv.org/abs/2403.13298"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.helpers import without_autocast
from x_transformers.module import empty_parameter
from x_transformers.position.rotary import RotaryEmbedding
from x_transformers.tensor_types import Bool, Float, Int


class GridRotary(RotaryEmbedding):
    """Angles of tokens that are the cells of a grid, numbered row by row; the first of ``axes`` may go on.

    The k-th pair of each axis turns by ``base ** (-k / pairs of the axis)`` a cell; pair p belongs to the axis p mod axes,
    counted from the last. With ``heads`` each pair of each key head turns by a learned sum over the axes instead: those
    frequencies times directions that start as the columns of random orthogonal matrices.

    forward: positions (n) or (b n) -> angles (1|b n dim), with ``heads`` (1|b heads n dim), each twice, and the scale, 1.
    """

    # a cell and the one behind it may lie in different rows: not only the distance of numbers counts
    by_distance = False

    def __init__(
        self,
        dim: int,
        axes: tuple[int, ...],
        *,
        base: float = 10000,
        interpolation_factor: float = 1.0,
        layout: str = 'interleaved',
        heads: int | None = None,
    ) -> None:
        self.axes = axes
        super().__init__(dim, base=base, interpolation_factor=interpolation_factor, layout=layout)
        self.directions = None if heads is None else empty_parameter(heads, len(axes), self.inv_freq.shape[0])
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        count, pairs = len(self.axes), torch.arange(self.inv_freq.shape[0], device=self.inv_freq.device)
        of_axis = -(-pairs.shape[0] // count)
        self.inv_freq.copy_(self.base ** (-(pairs // count).float() / of_axis))
        directions: nn.Parameter | None = getattr(self, 'directions', None)
        if directions is not None:
            random = torch.randn(directions.shape[0], count, count, device=directions.device)
            directions.copy_(torch.linalg.qr(random).Q[..., pairs % count] * self.inv_freq)

    def cells(self, t: Float[Tensor, '#b n']) -> Float[Tensor, '#b n a']:
        """The place of each token along each axis."""
        axes = []
        for length in reversed(self.axes[1:]):
            axes.append(t.remainder(length))
            t = t.div(length, rounding_mode='floor')
        return torch.stack((t, *reversed(axes)), dim=-1)

    def halves(
        self,
        t: Int[Tensor, 'n'] | Int[Tensor, 'b n'],
        *,
        centred: bool = True,
        seen: Bool[Tensor, 'b j'] | None = None,
    ) -> tuple[Float[Tensor, '#b ... n p'], float]:
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        places = self.cells((t if t.ndim == 2 else t.unsqueeze(0)).to(dtype)) / self.interpolation_factor
        if self.directions is not None:
            with without_autocast(places):  # an angle in half precision is off by whole turns
                return torch.einsum('bna,hap->bhnp', places, self.directions.to(dtype)), 1.0
        axis = len(self.axes) - 1 - torch.arange(self.inv_freq.shape[0], device=t.device) % len(self.axes)
        return places[..., axis] * self.inv_freq.to(dtype), 1.0
