"""Block diffusion: permutations that are written block after block, each block in any order.

A sequence is three blocks of eight tokens. The first is a permutation of eight symbols, each of the others is the one before
it, read backwards. BlockDiffusionWrapper learns them from noise, and then writes sequences from nothing. With one token in each
round a token knows those that are settled, so that no symbol comes twice. With several tokens in a round these do not know of
each other, and the fewer the rounds, the rarer are permutations: of eight tokens that are drawn alone one in 416 is one.
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import BlockDiffusionWrapper, PrefixDecoder, TransformerWrapper

SYMBOLS = SIZE = MASK = 8
BLOCKS = 3


def sequences(count: int) -> Tensor:
    block = torch.rand(count, SIZE).argsort(dim=-1)
    return torch.cat([block.flip(-1) if turn % 2 else block for turn in range(BLOCKS)], dim=-1)


def share_right(made: Tensor) -> float:
    """Sequences whose first block is a permutation, from which the others follow."""
    first, *others = made.split(SIZE, dim=-1)
    good = (first.sort(dim=-1).values == torch.arange(SYMBOLS)).all(dim=-1)
    for turn, block in enumerate(others, start=1):
        good &= (block == (first.flip(-1) if turn % 2 else first)).all(dim=-1)
    return good.float().mean().item()


def main() -> None:
    run = Run(__doc__, steps=500)
    net = TransformerWrapper(
        num_tokens=SYMBOLS + 1,
        max_seq_len=BLOCKS * SIZE,
        attn_layers=PrefixDecoder(dim=64, depth=2, heads=4, attn_dim_head=16, use_rmsnorm=True),
    )
    model = BlockDiffusionWrapper(net, mask_id=MASK, block_size=SIZE)
    run.train(model, lambda: model(sequences(64)), muon=net.muon_parameters())

    rows = 500 if run.whole else 20
    nothing, rounds = torch.zeros(rows, 0, dtype=torch.long), (1, 2, 4, SIZE)
    shares = [share_right(model.generate(nothing, BLOCKS * SIZE, steps=steps)) for steps in rounds]
    for steps, share in zip(rounds, shares, strict=True):
        print(f'{steps} rounds for a block: {share:.3f} of the sequences are right')

    shown, axes = figure(1, 1, width=4.0, height=2.6)
    axis = axes.flat[0]
    axis.plot(rounds, shares, marker='o')
    axis.set(xlabel='rounds for a block of 8 tokens', ylabel='share of right sequences', xticks=rounds, ylim=(-0.03, 1.03))
    run.picture(shown)
    run.check('share of right sequences', shares[-1], at_least=0.9, baseline=f'in one round for a block {shares[0]:.3f}')


if __name__ == '__main__':
    main()
