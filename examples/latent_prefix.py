"""A latent prefix that is chosen by its loss: of several random prefixes for a sequence, the best one is trained.

All sequences begin alike and go on in one of four ways, which nothing shows. The prefix comes to say which.
"""

from __future__ import annotations

import torch
from common import Run
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.xm_latent_decoder import XMLatentDecoder

WAYS, LENGTH = 4, 8


def sequences(rows: int) -> Tensor:
    """Token 0, then one of four tokens again and again (b 8)."""
    way = torch.randint(1, WAYS + 1, (rows, 1)).expand(-1, LENGTH - 1)
    return torch.cat((torch.zeros(rows, 1, dtype=torch.long), way), dim=1)


def main() -> None:
    run = Run(__doc__, steps=500)
    net = TransformerWrapper(
        num_tokens=WAYS + 1,
        max_seq_len=LENGTH + 2,
        attn_layers=Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, use_rmsnorm=True),
    )
    model = XMLatentDecoder(net, num_latents=1, candidates=8, latent_dim=4)
    run.train(model, lambda: model(sequences(32)), lr=3e-3)

    x = sequences(256)
    with torch.no_grad():
        best = model(x)
        any_other = model(x, latents=model.draw(256, 0, x.device)[:, :1])
    others = f'a prefix that was not chosen gives {any_other:.3f}'
    run.check('loss with the chosen prefix', best, at_most=0.5 * any_other.item(), baseline=others)

    made, latents = model.generate_with_candidate_latents(x[:, :2], 4, temperature=0.0, return_best_latents=True)
    again = model.generate(x[:, :1], 4, latents=latents, temperature=0.0)
    print(f'{(made == x[:, 2:6]).float().mean():.2f} of the tokens behind two given ones are right')
    right = (again[:, 0] == x[:, 1]).float().mean()
    run.check('way that a prefix chosen by two tokens leads', right, at_least=0.8, baseline=f'guessing reaches {1 / WAYS}')


if __name__ == '__main__':
    main()
