"""Trained on short windows, read long ones: ALiBi goes on (https://arxiv.org/abs/2108.12409), learned positions do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.drawing import name_beside
from x_transformers.training.data import load_corpus, sample_batch

SHORT, LONG, BATCH = 64, 256, 16
KINDS = {
    'absolute': ({}, True),
    'rotary': ({'rotary_pos_emb': True, 'rotary_emb_dim': 32}, False),
    'ALiBi': ({'alibi_pos_bias': True}, False),
}


def bits_by_place(model: TransformerWrapper, texts: Tensor) -> Tensor:
    """Bits per byte at each place of the window."""
    with torch.no_grad():
        logits = model(texts[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction='none').mean(dim=0) / math.log(2)


def main() -> None:
    run = Run(__doc__, steps=900)
    corpus = load_corpus(window=LONG + 1)
    texts = sample_batch(corpus.held_out, batch=96, window=LONG + 1, seed=1, index=0)
    bits, maps = {}, {}
    for name, (flags, absolute) in KINDS.items():
        layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, use_rmsnorm=True, **flags)
        model = TransformerWrapper(num_tokens=256, max_seq_len=LONG, use_abs_pos_emb=absolute, attn_layers=layers)
        trained, batches = AutoregressiveWrapper(model), iter(range(run.steps))

        def loss(trained: AutoregressiveWrapper = trained, batches: object = batches) -> Tensor:
            return trained(sample_batch(corpus.train, batch=BATCH, window=SHORT + 1, seed=0, index=next(batches)))

        run.train(trained, loss, share=1 / len(KINDS), lr=4e-3, says=name)
        bits[name] = bits_by_place(model, texts)
        # maps are computed when they are read, whatever kernel attended
        with torch.no_grad():
            _, intermediates = model(texts[:1, :-1], return_intermediates=True)
        maps[name] = intermediates.attn_intermediates[-1].post_softmax_attn[0].mean(dim=0)

    made, axes = figure(1, 1 + len(KINDS), width=11, height=2.7)
    for column, name in enumerate(KINDS, start=1):
        axes[0][0].plot(bits[name].view(-1, 16).mean(dim=1), label=name)
        axes[0][column].imshow(maps[name].clamp(min=1e-4).log().numpy(), cmap='magma', vmin=-9, vmax=0)
        axes[0][column].set_title(f'{name}: attention, last layer', fontsize=9)
    axes[0][0].axvline(SHORT / 16 - 0.5, color='grey', linewidth=0.8)
    axes[0][0].set(xlabel='place / 16', ylabel='bits per byte', title=f'trained on {SHORT} bytes')
    name_beside(axes[0][0])
    run.picture(made)

    beyond = {name: places[SHORT:].mean().item() for name, places in bits.items()}
    print(', '.join(f'{name}: {bits[name][:SHORT].mean():.2f} within, {beyond[name]:.2f} beyond' for name in KINDS))
    others = f'absolute positions need {beyond["absolute"]:.2f}, rotary {beyond["rotary"]:.2f}'
    run.check('bits per byte beyond the trained length', beyond['ALiBi'], at_most=beyond['absolute'] - 0.3, baseline=others)


if __name__ == '__main__':
    main()
