"""Image to caption: a picture of two digits becomes a sentence such as "three and nine make twelve".

A ViTransformerWrapper without classes gives one embedding per patch; a decoder looks at them while it writes the words.
"""

from __future__ import annotations

import torch
from common import Run, figure, show_image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

NUMBERS = [
    'zero',
    'one',
    'two',
    'three',
    'four',
    'five',
    'six',
    'seven',
    'eight',
    'nine',
    'ten',
    'eleven',
    'twelve',
    'thirteen',
    'fourteen',
    'fifteen',
    'sixteen',
    'seventeen',
    'eighteen',
]
WORDS = [*NUMBERS, 'and', 'make', '<start>']
AND, MAKE, START = range(len(NUMBERS), len(WORDS))
TRAINING = 1437  # of 1797 pictures


class Captioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = ViTransformerWrapper(
            image_size=16, patch_size=4, channels=1, attn_layers=Encoder(dim=96, depth=3, heads=4, use_rmsnorm=True)
        )
        self.mouth = AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=len(WORDS),
                max_seq_len=6,
                attn_layers=Decoder(dim=96, depth=2, heads=4, cross_attend=True, use_rmsnorm=True),
            )
        )

    def forward(self, pictures: Tensor, captions: Tensor) -> Tensor:
        return self.mouth(captions, context=self.eye(pictures, return_embeddings=True))

    def describe(self, pictures: Tensor) -> Tensor:
        start = torch.full((len(pictures), 1), START)
        with torch.no_grad():
            return self.mouth.generate(start, 5, temperature=0.0, context=self.eye(pictures, return_embeddings=True))


def batch(images: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Pictures (b 1 16 16) with a digit on the left and one on the right, at random heights, and captions (b 6)."""
    canvas = torch.zeros(rows, 1, 16, 16)
    left, right = torch.randint(len(images), (2, rows))
    for row, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        up, down = torch.randint(9, (2,)).tolist()
        canvas[row, 0, up : up + 8, :8] = images[a]
        canvas[row, 0, down : down + 8, 8:] = images[b]
    one, two = labels[left], labels[right]
    start, conjunction, verb = (torch.full_like(one, token) for token in (START, AND, MAKE))
    return canvas, torch.stack((start, one, conjunction, two, verb, one + two), dim=1)


def main() -> None:
    run = Run(__doc__, steps=400)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = Captioner()
    matrices = [*model.eye.attn_layers.muon_parameters(), *model.mouth.net.muon_parameters()]
    run.train(model, lambda: model(*batch(images[:TRAINING], labels[:TRAINING], 64)), lr=2e-3, muon=matrices)

    pictures, captions = batch(images[TRAINING:], labels[TRAINING:], 500)
    said = model.describe(pictures)
    right = (said == captions[:, 1:]).all(dim=1)
    drawn, axes = figure(2, 4, width=7.5, height=3.6)
    for axis, picture, words, fine in zip(axes.flat, pictures, said.tolist(), right.tolist(), strict=False):
        one, conjunction, two, verb, total = (WORDS[word] for word in words)
        show_image(axis, picture[0], f'{one} {conjunction} {two}\n{verb} {total}', right=fine)
    run.picture(drawn)
    run.check(
        'share of captions that are right, every word', right.float().mean(), at_least=0.75, baseline='guessing reaches 0.01'
    )


if __name__ == '__main__':
    main()
