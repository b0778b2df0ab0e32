"""Masked generation: a bidirectional net draws digits of 8 × 8 pixels in four greys, each together with its name.

A sequence is the digit's name and its 64 pixels, two to a token. NonAutoregressiveWrapper hides a random part of it and learns
to fill it in; to generate, everything is hidden and two tokens are settled per round: those that a critic, the net with one
more output, trusts most, with some chance. Without critic and chance the surest come first, which are those of the commonest
pictures. A classifier that has seen only real digits then reads the drawings: does it find what the net says it has drawn?
"""

from __future__ import annotations

import torch
from common import Run, figure, show_image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

GREYS, PAIRS = 4, 32
NAMES = GREYS**2
MASK, NUM_TOKENS = NAMES + 10, NAMES + 11  # tokens: pairs of greys, names, mask


def as_tokens() -> Tensor:
    pixels, names = load_digits(return_X_y=True)
    greys = (torch.tensor(pixels) / 16 * (GREYS - 1)).round().long()
    left, right = greys.unflatten(1, (PAIRS, 2)).unbind(dim=-1)
    return torch.cat((NAMES + torch.tensor(names)[:, None], GREYS * left + right), dim=1)


def as_pixels(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """(names (b), greys (b 64)); what is no pair of greys, which hardly ever happens, is read as some."""
    pairs = sequences[:, 1:] % NAMES
    return sequences[:, 0] - NAMES, torch.stack((pairs // GREYS, pairs % GREYS), dim=-1).flatten(1)


def variety(sequences: Tensor) -> float:
    """The number of different names, those that are rare counted less: the exponential of the entropy."""
    share = torch.bincount(sequences[:, 0], minlength=NUM_TOKENS) / len(sequences)
    return torch.special.entr(share).sum().exp().item()


def main() -> None:
    run = Run(__doc__, steps=440)
    data = as_tokens()
    net = TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=1 + PAIRS,
        attn_layers=Encoder(dim=96, depth=3, heads=4, attn_dim_head=24, use_rmsnorm=True),
    )
    model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=17, self_token_critic=True)
    run.train(model, lambda: model(data[torch.randint(len(data), (32,))]).loss, muon=net.muon_parameters())

    names, pixels = as_pixels(data)
    judge = SVC().fit(pixels, names)
    rows = 200 if run.whole else 20
    drawn = model.generate(rows, filter_thres=None, noise_level_scale=3.0)
    said, drawing = as_pixels(drawn)
    agree = (torch.tensor(judge.predict(drawing)) == said).float().mean()
    copies = (drawing[:, None] == pixels).all(dim=-1).any(dim=1).float().mean()
    surest = NonAutoregressiveWrapper(net, mask_id=MASK, steps=17).generate(rows, filter_thres=None)

    shown, axes = figure(2, 10, width=7.5, height=2.0)
    for axis, name, sample in zip(axes.flat, said.tolist(), drawing, strict=False):
        show_image(axis, sample.reshape(8, 8), str(name))
    run.picture(shown)
    print(f'{copies:.3f} of the drawings are copies of real ones')
    run.check('share of drawings that are read as they are named', agree, at_least=0.8, baseline='guessing reaches 0.1')
    without = f'without the critic {variety(surest):.1f}, real ones {variety(data):.1f}'
    run.check('effective number of different digits', variety(drawn), at_least=6.5, baseline=without)


if __name__ == '__main__':
    main()
