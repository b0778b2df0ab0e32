"""Encoder and decoder: copy a sequence of random digits, of any length up to 12, and stop where it ends.

XTransformer reads the source with its encoder; the decoder learns to write it again and then an end token. Both have sinusoidal
positions, so that a place of the target finds the same place of the source.
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import XTransformer

SYMBOLS, LENGTH = 10, 12
PAD, START, END = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (b 12), which of their places count (b 12), and targets (b 14): start, the same symbols, end, padding."""
    source = torch.randint(SYMBOLS, (rows, LENGTH))
    lens = torch.randint(1, LENGTH + 1, (rows, 1))
    real = torch.arange(LENGTH) < lens
    source = source.masked_fill(~real, PAD)
    target = torch.full((rows, LENGTH + 2), PAD)
    target[:, 0] = START
    target[:, 1:-1] = source
    return source, real, target.scatter(1, lens + 1, END)


def main() -> None:
    run = Run(__doc__, steps=400)
    model = XTransformer(
        dim=64,
        tie_token_emb=True,
        ignore_index=PAD,
        pad_value=PAD,
        enc_num_tokens=SYMBOLS + 3,
        enc_max_seq_len=LENGTH,
        enc_depth=1,
        enc_heads=4,
        enc_scaled_sinu_pos_emb=True,
        dec_num_tokens=SYMBOLS + 3,
        dec_max_seq_len=LENGTH + 2,
        dec_depth=2,
        dec_heads=4,
        dec_scaled_sinu_pos_emb=True,
    )

    def loss() -> Tensor:
        source, real, target = batch(64)
        return model(source, target, mask=real)

    run.train(model, loss, lr=3e-3)

    source, real, target = batch(200)
    copied = model.generate(source, target[:, :1], LENGTH + 1, mask=real, eos_token=END, temperature=0.0)
    wanted = target[:, 1 : 1 + copied.shape[1]]
    right = (copied == wanted).all(dim=1).float().mean()
    drawn, axes = figure(1, 3, width=8.0, height=2.8)
    with torch.no_grad():
        encoded, _ = model.encode(source[:3], mask=real[:3])
        _, inside = model.decoder.net(target[:3, :-1], context=encoded, context_mask=real[:3], return_intermediates=True)
    # the last cross attention, all heads together
    looked = [each for each in inside.attn_intermediates if each.layer_type == 'c'][-1].post_softmax_attn.mean(dim=1)
    for axis, weights, length in zip(axes[0], looked, real.sum(dim=1).tolist(), strict=False):
        axis.imshow(weights[: length + 1, :length].numpy(), vmin=0, vmax=1, cmap='Blues')
        axis.set(xlabel='source', ylabel='target', xticks=[], yticks=[])
    run.picture(drawn)

    print('source', [int(s) for s in source[0][real[0]]])
    print('copy  ', [int(s) for s in copied[0] if s != PAD])
    run.check('share of sequences copied without a mistake', right, at_least=0.98, baseline='guessing reaches 0.00')


if __name__ == '__main__':
    main()
