"""Transformer-XL: segments of 16 tokens that repeat what was said 24 tokens ago, which no single segment shows.

The same decoder is trained twice at the same segment length: once seeing each segment alone, once with the memories of the
one before (XLAutoregressiveWrapper). Then the model with memories continues a prompt across the borders of its segments.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.drawing import name_beside

SYMBOLS, PERIOD, SEGMENT, SEGMENTS = 16, 24, 16, 6


def sequences(rows: int) -> Tensor:
    """Random symbols with a period of 24: six segments and one token to predict (b 97)."""
    period = torch.randint(SYMBOLS, (rows, PERIOD))
    return period.repeat(1, 5)[:, : SEGMENT * SEGMENTS + 1]


def network(max_mem_len: int) -> TransformerWrapper:
    return TransformerWrapper(
        num_tokens=SYMBOLS,
        max_seq_len=SEGMENT,
        max_mem_len=max_mem_len,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=64, depth=2, heads=4, rotary_pos_emb=True),
    )


@torch.no_grad()
def bits_by_place(net: TransformerWrapper, x: Tensor) -> Tensor:
    """Bits per token at each place of the sequence, memories handed on if the net keeps any."""
    mems, bits = None, []
    for read, wanted in zip(x[:, :-1].split(SEGMENT, dim=1), x[:, 1:].split(SEGMENT, dim=1), strict=True):
        logits, mems = net(read, mems=mems, return_mems=True)
        bits.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction='none').mean(dim=0) / math.log(2))
    return torch.cat(bits)


def main() -> None:
    run = Run(__doc__, steps=600)
    plain = AutoregressiveWrapper(network(0))
    xl = XLAutoregressiveWrapper(network(2 * SEGMENT))

    def segment_loss(x: Tensor) -> Tensor:
        """Each segment alone, with the token after it."""
        return plain(x.unfold(1, SEGMENT + 1, SEGMENT).flatten(0, 1))

    run.train(plain, lambda: segment_loss(sequences(16)), share=0.5, says='segments alone')
    run.train(xl, lambda: xl(sequences(16)), share=0.5, says='with memories')

    x = sequences(200)
    with torch.no_grad():
        alone, remembered = (loss.item() / math.log(2) for loss in (segment_loss(x), xl(x)))
    floor = math.log2(SYMBOLS) * (PERIOD - 1) / (SEGMENT * SEGMENTS)  # the first period cannot be known

    drawn, axes = figure(1, 1, width=7.0, height=2.6)
    for label, net in (('segments alone', plain.net), ('with memories', xl.net)):
        axes[0][0].plot(bits_by_place(net, x).numpy(), label=label)
    for border in range(SEGMENT, SEGMENT * SEGMENTS, SEGMENT):
        axes[0][0].axvline(border - 0.5, color='grey', linewidth=0.6, linestyle=':')
    axes[0][0].set(xlabel='place in the sequence (dotted: where segments begin)', ylabel='bits per token')
    name_beside(axes[0][0])
    run.picture(drawn)

    prompt, wanted = x[:, : 2 * PERIOD], x[:, 2 * PERIOD :]
    right = (xl.generate(prompt, wanted.shape[1], temperature=0.0) == wanted).float().mean()
    print(f'{wanted.shape[1]} tokens generated after {prompt.shape[1]}: {right:.3f} of them right')
    baseline = f'segments alone {alone:.3f}, the best possible {floor:.3f}'
    run.check('share of generated tokens right', right, at_least=0.95, baseline=f'guessing reaches {1 / SYMBOLS:.3f}')
    run.check('bits per token with memories', remembered, at_most=min(0.5 * alone, 1.3 * floor), baseline=baseline)


if __name__ == '__main__':
    main()
