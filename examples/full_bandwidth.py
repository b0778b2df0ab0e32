"""Full bandwidth: what deep blocks knew at the last token goes into shallow blocks at the next.

Each sequence counts modulo 16 in a step of its own. The net is trained in parallel passes and writes token by token.
"""

from __future__ import annotations

from common import Run, counted

from x_transformers import Decoder, TransformerWrapper
from x_transformers.full_bandwidth import FullBandwidth

SYMBOLS, LENGTH = 16, 20


def main() -> None:
    run = Run(__doc__, steps=200)
    layers = Decoder(
        dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, depth_scale_residual=True, use_rmsnorm=True
    )
    net = TransformerWrapper(
        num_tokens=SYMBOLS,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        attn_layers=layers,
        tie_embedding=True,
        tie_embedding_scale=1 / 8,
        post_emb_norm=True,
    )
    # with two passes only, what is trained is not yet what tokens that are written one by one have seen
    model = FullBandwidth(net, temporal_parallel_passes=4)
    run.train(model, lambda: model(counted(32, LENGTH, SYMBOLS)), lr=3e-3)

    x = counted(256, LENGTH, SYMBOLS)
    made = model.generate(x[:, :4], LENGTH - 4, temperature=0.0)
    right = (made == x[:, 4:]).float().mean()
    run.check('share of tokens right', right, at_least=0.95, baseline=f'guessing reaches {1 / SYMBOLS:.3f}')


if __name__ == '__main__':
    main()
