"""Image classification: a vision transformer reads scikit-learn's 8 × 8 pictures of handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run, figure, show_image
from sklearn.datasets import load_digits
from torch import Tensor

from x_transformers import Encoder, ViTransformerWrapper

TRAINING = 1437  # of 1797 pictures


def shifted(images: Tensor) -> Tensor:
    """Each picture, moved by up to one pixel."""
    down, right = torch.randint(3, (2, len(images), 1, 1))
    rows, columns = torch.arange(8)[:, None] + down, torch.arange(8)[None] + right
    return F.pad(images, (1, 1, 1, 1))[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def main() -> None:
    run = Run(__doc__, steps=1000)
    pixels, names = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(names)
    model = ViTransformerWrapper(
        image_size=8,
        patch_size=4,
        channels=1,
        num_classes=10,
        num_register_tokens=2,
        attn_layers=Encoder(dim=64, depth=2, heads=4, use_rmsnorm=True),
    )

    def loss() -> Tensor:
        chosen = torch.randint(TRAINING, (64,))
        return F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=0.1)

    run.train(model, loss, lr=2e-3, weight_decay=0.05)

    with torch.no_grad():
        said = model(images[TRAINING:]).argmax(dim=-1)
    real = labels[TRAINING:]
    accuracy = (said == real).float().mean()
    means = torch.stack([images[:TRAINING][labels[:TRAINING] == digit].mean(dim=0) for digit in range(10)])
    nearest = torch.cdist(images[TRAINING:].flatten(1), means.flatten(1)).argmin(dim=-1)

    drawn, axes = figure(2, 10, width=7.5, height=2.0)
    wrong = (said != real).nonzero().flatten().tolist()
    for axis, index in zip(axes.flat, [*wrong[:10], *range(20)], strict=False):
        right = bool(said[index] == real[index])
        title = f'{said[index]}' if right else f'{said[index]}, not {real[index]}'
        show_image(axis, images[TRAINING + index, 0], title, right=right)
    run.picture(drawn)
    simple = (nearest == real).float().mean()
    run.check('accuracy on digits not seen', accuracy, at_least=0.93, baseline=f'the nearest mean picture: {simple:.3f}')


if __name__ == '__main__':
    main()
