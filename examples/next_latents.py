"""Predict the next latents: a net that counts in steps, and a small one rolls out what it will think two places on.

Each sequence counts modulo 32 in a step of its own, which the first two tokens show.
"""

from __future__ import annotations

import torch
from common import Run, counted

from x_transformers import AutoregressiveWrapper, Decoder, NextLatentWrapper, TransformerWrapper

SYMBOLS, LENGTH = 32, 24


def main() -> None:
    run = Run(__doc__, steps=400)
    net = TransformerWrapper(
        num_tokens=SYMBOLS,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, use_rmsnorm=True),
    )
    model = NextLatentWrapper(net, dim=64, num_rollouts=2)
    run.train(model, lambda: model(counted(32, LENGTH, SYMBOLS, steps=7)), lr=3e-3)

    x = counted(256, LENGTH, SYMBOLS, steps=7)
    with torch.no_grad():
        _, parts = model(x, return_loss_breakdown=True)
    made = AutoregressiveWrapper(net).generate(x[:, :4], LENGTH - 4, temperature=0.0)
    right = (made == x[:, 4:]).float().mean()
    run.check('share of tokens right', right, at_least=0.98, baseline=f'guessing reaches {1 / SYMBOLS:.3f}')
    others = 'distributions that have nothing to do with each other are several nats apart'
    run.check('divergence of what rolled-out latents predict', parts.kl, at_most=0.5, baseline=others)


if __name__ == '__main__':
    main()
