"""A looped model: two blocks run up to three times on their own output, and a gate says when that is enough.

Each sequence counts modulo 16 in a step of its own. The gates come to see that one loop does for
most tokens.
"""

from __future__ import annotations

from common import Run, counted

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

SYMBOLS, LENGTH, LOOPS = 16, 20, 3


def main() -> None:
    run = Run(__doc__, steps=300)
    layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, pre_and_post_norm=True, use_rmsnorm=True)
    net = TransformerWrapper(
        num_tokens=SYMBOLS,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        attn_layers=layers,
        looped=True,
        max_looped_steps=LOOPS,
        looped_positions=True,
    )
    model = AutoregressiveWrapper(net)
    run.train(model, lambda: model(counted(32, LENGTH, SYMBOLS)), lr=3e-3)

    x = counted(256, LENGTH, SYMBOLS)
    made, seen = model.generate(x[:, :4], LENGTH - 4, temperature=0.0, return_intermediates=True)
    right = (made == x[:, 4:]).float().mean()
    loops = seen.exit_indices.float().mean() + 1
    run.check('share of tokens right', right, at_least=0.95, baseline=f'guessing reaches {1 / SYMBOLS:.3f}')
    run.check('loops that were run on average', loops, at_most=2.0, baseline=f'without gates there are {LOOPS}')


if __name__ == '__main__':
    main()
