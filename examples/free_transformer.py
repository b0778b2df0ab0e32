"""The Free Transformer decides in a latent code what to write, and then writes it (https://arxiv.org/abs/2510.17558).

Each line is dashes with one letter, repeated a few times at random places. Which letter is a decision about the whole line.
"""

from __future__ import annotations

import math

import torch
from common import Run, figure
from torch import Tensor

from x_transformers.free_transformer import FreeTransformer

BITS, LETTERS, LENGTH, BATCH = 8, 8, 20, 64
DASH, START = LETTERS, LETTERS + 1


def lines(rows: int) -> Tensor:
    letter = torch.randint(LETTERS, (rows, 1))
    shown = torch.rand(rows, LENGTH) < 0.3
    return torch.cat((torch.full((rows, 1), START), torch.where(shown, letter, DASH)), dim=1)


def main() -> None:
    run = Run(__doc__, steps=300)
    model = FreeTransformer(
        num_tokens=LETTERS + 2,
        dim=64,
        dec_head_depth=1,
        dec_tail_depth=2,
        max_seq_len=LENGTH + 1,
        attn_dim_head=32,
        heads=2,
        rotary_emb_dim=32,
        latent_bits=BITS,
        per_token_latents=False,
        kl_loss_threshold=BITS * math.log(2),  # all bits are free; where some are charged for, they stay noisy
    )
    matrices = [p for stack in (model.encoder, model.decoder_head, model.decoder_tail) for p in stack.muon_parameters()]
    run.train(model, lambda: model(lines(BATCH)), lr=3e-3, muon=matrices)

    # a line is read into a code, and another one is written from that code
    examples = lines(400)
    with torch.no_grad():
        codes = model.encode_to_latents(model.head(examples))
    written = model.generate(
        examples[:, :1], LENGTH + 1, latents=codes, filter_logits_fn='top_p', logit_filter_kwargs={'thres': 0.98}
    )
    for read, line in zip(examples[:5, 1:].tolist(), written[:5, 1:].tolist(), strict=True):
        print(' -> '.join(''.join('abcdefgh-^'[token] for token in tokens) for tokens in (read, line)))
    letters = torch.arange(LETTERS)
    shares = torch.stack([(written == letter).sum(dim=1) for letter in letters], dim=1).float()
    own = (examples[..., None] == letters).any(dim=1)
    same = (shares * own).sum() / shares.sum()

    # which bits mean which letter
    bits = codes[:, 0].argmax(dim=-1)[:, None] >> torch.arange(BITS) & 1
    table = own.float().T @ bits.float() / own.sum(dim=0)[:, None]
    made, axes = figure(1, 1, width=3.2, height=2.8)
    axes[0][0].imshow(table.numpy(), vmin=0, vmax=1, cmap='Blues')
    axes[0][0].set(ylabel='letter of the line', xlabel='bit of the code', yticks=range(LETTERS), yticklabels=list('abcdefgh'))
    run.picture(made)
    run.check("letters written that are the code's", same, at_least=0.9, baseline=f'without a code {1 / LETTERS:.3f} would be')


if __name__ == '__main__':
    main()
