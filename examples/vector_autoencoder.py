"""One latent for a sequence of vectors: an encoder squeezes a curve into four numbers, from which a decoder draws it again.

The curves are points on circles of different size, pace and phase. The first point is known to the latent alone.
"""

from __future__ import annotations

import math

import torch
from common import Run
from torch import Tensor

from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder

LENGTH = 16


def circles(rows: int) -> Tensor:
    """Points on circles (b 16 2)."""
    size, pace = 0.5 + torch.rand(rows, 1), 0.2 + 0.4 * torch.rand(rows, 1)
    angle = 2 * math.pi * torch.rand(rows, 1) + pace * torch.arange(LENGTH)
    return torch.stack((size * angle.cos(), size * angle.sin()), dim=-1)


@torch.no_grad()
def drawn(model: ContinuousTransformerAutoencoder, latents: Tensor) -> Tensor:
    """Curves from latents, point by point (b 16 2)."""
    made = latents.new_zeros(latents.shape[0], 1, 2)
    for place in range(LENGTH):
        made[:, place] = model.decode(latents, made)[:, place]
        made = torch.cat((made, torch.zeros_like(made[:, :1])), dim=1)
    return made[:, :LENGTH]


def main() -> None:
    run = Run(__doc__, steps=500)
    model = ContinuousTransformerAutoencoder(
        dim=64, enc_depth=1, dec_depth=1, max_seq_len=LENGTH + 1, dim_input=2, dim_latent=4, heads=2, attn_dim_head=32,
        latents_dropout_prob=0.1,
    )  # fmt: skip
    run.train(model, lambda: model(circles(64)), lr=2e-3)

    x = circles(256)
    with torch.no_grad():
        latents = model.encode(x)
        first = (model.decode(latents, x)[:, 0] - x[:, 0]).square().mean()
    again = drawn(model, latents)

    baseline = f'the mean of all first points is {x[:, 0].var():.2f} away'
    run.check('squared error of the first point', first, at_most=0.05, baseline=baseline)
    error = (again - x).square().mean()
    run.check('squared error of whole curves', error, at_most=0.25, baseline=f'their variance is {x.var():.2f}')


if __name__ == '__main__':
    main()
