"""Test-time training: weights that are moved while a sequence is read remember what no segment shows.

Each sequence has a table of its own, from eight letters to eight others, and is read in segments of twelve tokens with memories
of one state. Segments show a few entries each. The same net is trained with fast weights and without.
"""

from __future__ import annotations

import torch
from common import Run
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper

LETTERS, SEGMENT, SEGMENTS = 8, 12, 4


def looked_up(rows: int) -> Tensor:
    """Letter, its entry, letter, its entry … (b 49)."""
    table = torch.stack([torch.randperm(LETTERS) for _ in range(rows)])
    letters = torch.randint(LETTERS, (rows, SEGMENT * SEGMENTS // 2 + 1))
    x = torch.stack((letters, LETTERS + table.gather(1, letters)), dim=-1).flatten(1)
    return x[:, : SEGMENT * SEGMENTS + 1]


def wrapper(**settings: object) -> XLAutoregressiveWrapper:
    net = TransformerWrapper(
        num_tokens=2 * LETTERS,
        max_seq_len=SEGMENT,
        max_mem_len=1,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=48, depth=2, heads=2, attn_dim_head=24, rotary_pos_emb=True, use_rmsnorm=True),
    )
    return XLAutoregressiveWrapper(net, **settings)


def main() -> None:
    run = Run(__doc__, steps=240)
    plain = wrapper()
    fast = wrapper(tbptt_steps=SEGMENTS, ttt_module_paths=('attn_layers.layers.3.1.ff.2',), ttt_lr=2.0, ttt_wd=0.0)
    losses = {}
    for name, model in (('weights that stay', plain), ('fast weights', fast)):
        torch.manual_seed(1)
        run.train(model, lambda model=model: model(looked_up(16)), share=0.5, lr=3e-3, says=name)
        torch.manual_seed(2)
        losses[name] = model(looked_up(128)).item()
    # half of the tokens are letters, which cannot be foretold
    floor = 0.5 * torch.tensor(float(LETTERS)).log().item()
    stay, moved = losses.values()
    baseline = f'weights that stay have {stay:.3f}, knowing the table {floor:.3f}'
    run.check('loss with fast weights', moved, at_most=stay - 0.25 * (stay - floor), baseline=baseline)


if __name__ == '__main__':
    main()
