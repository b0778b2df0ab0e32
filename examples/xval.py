"""Arithmetic with xVal: a number is one token scaled by its value, so numbers never seen are read and written like the others.

Trained on sums, differences and products of a few numbers only, asked for those of all numbers between
(https://arxiv.org/abs/2310.02989).
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import Decoder, XValAutoregressiveWrapper, XValTransformerWrapper

NUMBER, EQUALS, OPERATIONS = 0, 1, {2: '+', 3: '-', 4: '*'}
WIDEST, SEEN, BATCH = 2.0, 9, 64
seen = torch.linspace(-WIDEST, WIDEST, SEEN)


def results(a: Tensor, operation: Tensor, b: Tensor) -> Tensor:
    return torch.where(operation == 2, a + b, torch.where(operation == 3, a - b, a * b))


def equations(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and numbers of ``a operation b = result``, both ``rows 5``; numbers that are none are NaN."""
    operation = torch.randint(2, 5, a.shape)
    number, equals, none = torch.full_like(operation, NUMBER), torch.full_like(operation, EQUALS), torch.full_like(a, torch.nan)
    tokens = torch.stack((number, operation, number, equals, number), dim=1)
    return tokens, torch.stack((a, none, b, none, results(a, operation, b)), dim=1)


def trained_on() -> tuple[Tensor, Tensor]:
    return equations(*seen[torch.randint(SEEN, (2, BATCH))])


def main() -> None:
    run = Run(__doc__, steps=1000)
    net = XValTransformerWrapper(
        num_tokens=5, max_seq_len=5, numerical_token_id=NUMBER, attn_layers=Decoder(dim=64, depth=3, heads=2, attn_dim_head=32)
    )
    model = XValAutoregressiveWrapper(net)
    run.train(model, lambda: model(*trained_on()))

    a, b = WIDEST * (2 * torch.rand(2, 600) - 1)
    tokens, numbers = equations(a, b)
    answer = model.generate(tokens[:, :4], numbers[:, :4], 1, temperature=0.0)
    true, given = numbers[:, 4], answer.sampled_numbers[:, 0]
    error = (given - true).square().mean().sqrt().item()
    nearest_a, nearest_b = (seen[(x[:, None] - seen).abs().argmin(dim=1)] for x in (a, b))
    nearest = (results(nearest_a, tokens[:, 1], nearest_b) - true).square().mean().sqrt().item()

    made, axes = figure(1, 3, width=8, height=2.8)
    for column, (operation, sign) in enumerate(OPERATIONS.items()):
        rows = tokens[:, 1] == operation
        axes[0][column].plot([-4, 4], [-4, 4], color='lightgrey')
        axes[0][column].scatter(true[rows], given[rows], s=4)
        axes[0][column].set(title=f'a {sign} b', xlabel='true', ylabel='written' if column == 0 else '')
    run.picture(made)
    run.check('error on numbers never seen', error, at_most=0.5 * nearest,
              baseline=f'the answer for the nearest numbers seen is off by {nearest:.2f}')  # fmt: skip


if __name__ == '__main__':
    main()
