"""Means and variances: a series whose noise grows with its last value, predicted by Gaussian likelihood.

The next value is 0.8 times the last one, with noise of deviation 0.1 + 0.4 |last|. A net with probabilistic=True learns both,
and samples what may come: the picture shows its quantiles beside those of the series itself.
"""

from __future__ import annotations

import math

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper, Decoder

LENGTH, AHEAD, LEVELS = 48, 16, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])


def deviation(last: Tensor) -> Tensor:
    return 0.1 + 0.4 * last.abs()


def series(start: Tensor, steps: int) -> Tensor:
    """The values that follow ``start`` (b), with it in front (b, 1 + steps)."""
    values = [start]
    for _ in range(steps):
        values.append(0.8 * values[-1] + deviation(values[-1]) * torch.randn(len(start)))
    return torch.stack(values, dim=1)


def likelihoods(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per value without the constant: of the series' own noise, and of the one deviation that fits best everywhere."""
    last, noise = x[:, :-1], x[:, 1:] - 0.8 * x[:, :-1]
    own = 0.5 * (deviation(last).square().log() + (noise / deviation(last)).square())
    return own.mean(), 0.5 * (noise.square().mean().log() + 1)


def main() -> None:
    run = Run(__doc__, steps=300)
    model = ContinuousAutoregressiveWrapper(
        ContinuousTransformerWrapper(
            dim_in=1,
            dim_out=1,
            max_seq_len=LENGTH,
            probabilistic=True,
            attn_layers=Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, use_rmsnorm=True),
        )
    )

    def draw(rows: int) -> Tensor:
        return series(torch.randn(rows), LENGTH - 1)[..., None]

    run.train(model, lambda: model(draw(64)))

    tests = draw(500)
    with torch.no_grad():
        learned = model(tests)
    own, constant = likelihoods(tests.squeeze(-1))

    start = torch.full((1000,), 1.5)
    continued = model.generate(start[:, None, None], AHEAD).squeeze(-1)
    there, said = (t.quantile(LEVELS, dim=0) for t in (series(start, AHEAD)[:, 1:], continued))
    drawn, axes = figure(1, 1, width=5.5, height=2.8)
    for level, real, sampled in zip(LEVELS.tolist(), there, said, strict=True):
        axes[0][0].plot(real, color='0.75', linewidth=4)
        axes[0][0].plot(sampled, color='C0')
        axes[0][0].text(AHEAD - 0.8, float(sampled[-1]), f'{level:.0%}', fontsize=8, va='center')
    axes[0][0].set(xlabel='steps ahead', title='quantiles after 1.5: the series (grey), the model (blue)')
    run.picture(drawn)

    bits = (learned - own) / math.log(2)
    others = f'one deviation for all {(constant - own) / math.log(2):.3f}'
    run.check('bits per value more than knowing the noise', bits, at_most=0.05, baseline=others)


if __name__ == '__main__':
    main()
