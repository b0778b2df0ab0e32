"""Read each token twice: the second reading begins with a mixture of what entered a shallow and what entered a deep layer.

Each sequence counts modulo 16 in a step of its own. A net learns that reading once; then small networks learn to mix, while
the net stays as it is and every token is read twice.
"""

from __future__ import annotations

import torch
from common import Run, counted

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.recirculation import Recirculation

SYMBOLS, LENGTH = 16, 12


def main() -> None:
    run = Run(__doc__, steps=300)
    layers = Decoder(dim=64, depth=3, heads=2, attn_dim_head=32, rotary_pos_emb=True, use_rmsnorm=True)
    net = TransformerWrapper(num_tokens=SYMBOLS, max_seq_len=LENGTH, use_abs_pos_emb=False, attn_layers=layers)
    once = AutoregressiveWrapper(net)
    run.train(once, lambda: once(counted(32, LENGTH, SYMBOLS)), share=0.9, lr=3e-3, says='reading once')

    model = Recirculation(net, source_layer=2, destination_layer=0, use_learned=True)
    twice = AutoregressiveWrapper(model)
    with torch.no_grad():
        before = twice(counted(256, LENGTH, SYMBOLS))
    net.requires_grad_(False)
    run.train(twice, lambda: twice(counted(32, LENGTH, SYMBOLS)), share=0.1, lr=3e-3, says='mixing')

    x = counted(256, LENGTH, SYMBOLS)
    with torch.no_grad():
        after = twice(x)
    made = twice.generate(x[:, :4], LENGTH - 4, temperature=0.0)
    right = (made == x[:, 4:]).float().mean()
    guessing = f'guessing reaches {1 / SYMBOLS:.3f}'
    run.check('share of tokens right, each read twice', right, at_least=0.9, baseline=guessing)
    run.check('loss of reading twice', after, at_most=before.item(), baseline=f'before the mixing was learned {before:.3f}')


if __name__ == '__main__':
    main()
