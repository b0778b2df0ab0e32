"""Masked generation: a bidirectional net draws digits of 8 × 8 pixels in four greys, each together with its name.

A sequence is the digit's name and its 64 pixels. NonAutoregressiveWrapper hides a random part of it and learns to fill it in;
to generate, everything is hidden and a few tokens are settled per round. A classifier that has seen only real digits then
reads the drawings: does it find the digit that the net says it has drawn?
"""

from __future__ import annotations

import torch
from common import Run, figure, show_image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

GREYS, PIXELS = 4, 64
MASK, NUM_TOKENS = GREYS + 10, GREYS + 11  # tokens: greys, names, mask


def as_tokens() -> Tensor:
    pixels, names = load_digits(return_X_y=True)
    greys = (torch.tensor(pixels) / 16 * (GREYS - 1)).round().long()
    return torch.cat((GREYS + torch.tensor(names)[:, None], greys), dim=1)


def main() -> None:
    run = Run(__doc__, steps=700)
    data = as_tokens()
    net = TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=1 + PIXELS,
        attn_layers=Encoder(dim=96, depth=4, heads=4, use_rmsnorm=True, ff_glu=True),
    )
    model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=33, schedule='linear')
    run.train(model, lambda: model(data[torch.randint(len(data), (64,))]).loss, lr=2e-3)

    judge = SVC().fit(data[:, 1:], data[:, 0] - GREYS)
    drawn = model.generate(200 if run.whole else 20, filter_thres=None)
    read = torch.tensor(judge.predict(drawn[:, 1:]))
    agree = (read == drawn[:, 0] - GREYS).float().mean()
    # what the pixels' frequencies alone would draw, knowing the digit: each pixel from another picture of it
    same = [data[data[:, 0] == name] for name in data[:200, 0]]
    mixed = torch.stack([rows[torch.randint(len(rows), (PIXELS,)), torch.arange(1, 1 + PIXELS)] for rows in same])
    naive = (torch.tensor(judge.predict(mixed)) == data[:200, 0] - GREYS).float().mean()
    copies = (drawn[:, None, 1:] == data[None, :, 1:]).all(dim=-1).any(dim=1).float().mean()

    shown, axes = figure(2, 10, width=7.5, height=2.0)
    for axis, sample in zip(axes.flat, drawn, strict=False):
        show_image(axis, sample[1:].reshape(8, 8), str(int(sample[0]) - GREYS))
    run.picture(shown)
    print(f'{copies:.3f} of the drawings are copies of real ones; each pixel drawn for itself is read as named: {naive:.3f}')
    run.check('share of drawings that are read as they are named', agree, at_least=0.8, baseline='guessing reaches 0.1')


if __name__ == '__main__':
    main()
