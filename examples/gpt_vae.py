"""A GPT-VAE puts what is special about a sequence into a latent, which then steers what is written.

Each sequence is a rough line of its own height and slope. All begin with the same token: only the latent tells what is to come.
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers.gpt_vae import GPTVAE

NUMBERS, LENGTH, BATCH = 32, 16, 64
START = NUMBERS


def lines(rows: int) -> tuple[Tensor, Tensor]:
    """(start token and ``b n`` rounded numbers, the same without roughness)."""
    height, slope = 10 + 12 * torch.rand(rows, 1), 18 * torch.rand(rows, 1) - 9
    smooth = height + slope * torch.linspace(-1, 1, LENGTH)
    rough = (smooth + 0.7 * torch.randn(rows, LENGTH)).round().long().clamp(0, NUMBERS - 1)
    return torch.cat((torch.full((rows, 1), START), rough), dim=1), smooth


def main() -> None:
    run = Run(__doc__, steps=600)
    model = GPTVAE(
        num_tokens=NUMBERS + 1, dim=64, depth=2, enc_depth=1, max_seq_len=LENGTH + 1, dim_latent=2, attn_dim_head=32, heads=2,
        vae_kl_loss_weight=0.005, latents_dropout_prob=0.1, use_rmsnorm=True,
    )  # fmt: skip
    run.train(model, lambda: model(lines(BATCH)[0]), lr=3e-3)

    examples, smooth = lines(200)
    start = examples[:, :1]

    def error(**latents: Tensor) -> float:
        """Between what is written behind the start token and the examples' lines."""
        written = model.generate(start, LENGTH, filter_logits_fn='top_p', **latents)
        return (written - smooth).abs().mean().item()

    # what latents around the middle write
    made, axes = figure(3, 3, width=5, height=4)
    places = torch.tensor([-1.2, 0.0, 1.2])
    for row in range(3):
        for column in range(3):
            latent = torch.stack((places[column], places[2 - row]))
            written = model.generate(start[:5], LENGTH, latents=latent, filter_logits_fn='top_p')
            axes[row][column].plot(written.T, color='C0', alpha=0.5, linewidth=0.8)
            axes[row][column].set(ylim=(0, NUMBERS), xticks=[], yticks=[])
            axes[row][column].set_title(f'latent {latent[0]:.1f}, {latent[1]:.1f}', fontsize=8)
    run.picture(made)
    alone = error()
    run.check('distance from the line in the latent', error(seq_for_latents=examples), at_most=0.4 * alone,
              baseline=f'without a latent {alone:.2f}; the roughness alone makes 0.6')  # fmt: skip


if __name__ == '__main__':
    main()
