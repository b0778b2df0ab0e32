"""A NeoMLP, whose neurons are tokens, fits a function of the plane (https://openreview.net/forum?id=A8Vuf2e8y6)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import NeoMLP

SIDE, BATCH = 48, 128


def target(xy: Tensor) -> Tensor:
    """A ripple around the origin and a bump beside it, ``b 2`` in the square from -1 to 1 to ``b 2``."""
    x, y = xy.unbind(dim=-1)
    ripple = torch.sin(2 * math.pi * (x.square() + y.square()).sqrt() * 1.5)
    bump = torch.exp(-((x - 0.4).square() + (y + 0.3).square()) * 12)
    return torch.stack((ripple, bump), dim=-1)


def main() -> None:
    run = Run(__doc__, steps=1200)
    model = NeoMLP(dim_in=2, dim_hidden=6, dim_out=2, dim_model=48, depth=3, encoder_kwargs={'heads': 4, 'attn_dim_head': 12})

    def loss() -> Tensor:
        xy = 2 * torch.rand(BATCH, 2) - 1
        return F.mse_loss(model(xy), target(xy))

    run.train(model, loss, lr=3e-3)

    # points of a grid: none of them was trained on
    line = torch.linspace(-1, 1, SIDE)
    grid = torch.stack(torch.meshgrid(line, line, indexing='xy'), dim=-1).flatten(0, 1)
    with torch.no_grad():
        fitted = model(grid)
    true = target(grid)
    error = ((fitted - true).square().mean(dim=0) / true.var(dim=0)).max().item()

    made, axes = figure(2, 2, width=5, height=4.6)
    for row, (title, values) in enumerate((('function', true), ('NeoMLP', fitted))):
        for column in range(2):
            axes[row][column].imshow(values[:, column].view(SIDE, SIDE).numpy(), cmap='viridis', origin='lower')
            axes[row][column].set_title(f'{title}, output {column}', fontsize=9)
            axes[row][column].axis('off')
    run.picture(made)
    run.check('squared error over variance', error, at_most=0.01, baseline='the mean value has 1')


if __name__ == '__main__':
    main()
