"""Joint embeddings for language: the net learns by predicting its own latents, and a probe learns to read the tokens from them.

Each sequence counts modulo 16 in a step of its own. A tenth of the probe's gradient reaches the net.
"""

from __future__ import annotations

import torch
from common import Run, counted

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.gpt_lejepa import LatentAutoregressive

SYMBOLS, LENGTH = 16, 20


def main() -> None:
    run = Run(__doc__, steps=200)
    net = TransformerWrapper(
        num_tokens=SYMBOLS,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, use_rmsnorm=True),
    )
    model = LatentAutoregressive(net, dim=64, frac_gradient=0.1, sigreg_loss_kwargs={'num_slices': 32})
    run.train(model, lambda: model(counted(32, LENGTH, SYMBOLS)), lr=3e-3)

    x = counted(256, LENGTH, SYMBOLS)
    made = AutoregressiveWrapper(net).generate(x[:, :4], LENGTH - 4, temperature=0.0)
    right = (made == x[:, 4:]).float().mean()
    run.check('share of tokens right', right, at_least=0.95, baseline=f'guessing reaches {1 / SYMBOLS:.3f}')
    with torch.no_grad():
        _, parts = model(x, return_loss_breakdown=True)
    run.check('error of predicted latents', parts.l2, at_most=0.5, baseline='vectors that are not alike have about 2')


if __name__ == '__main__':
    main()
