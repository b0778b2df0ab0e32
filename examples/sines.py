"""Sequences of vectors: go on with a mixture of two sine waves whose periods, phases and sizes are new each time.

A vector holds eight values of the wave. A decoder learns to predict the next one, then for a while over rollouts, in which it
reads its own predictions. It has to find the two waves in 96 values and continues them for 32 more.
"""

from __future__ import annotations

import math

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper, Decoder
from x_transformers.drawing import name_beside

FRAME, FRAMES, PROMPT = 8, 16, 12


def waves(rows: int) -> Tensor:
    """Two sines of periods from 12 to 48 steps (b 16 8)."""
    frequency = 2 * math.pi / torch.empty(rows, 1, 2).uniform_(12, 48)
    phase = torch.rand(rows, 1, 2) * 2 * math.pi
    size = torch.empty(rows, 1, 2).uniform_(0.3, 1.0)
    time = torch.arange(FRAMES * FRAME)[None, :, None]
    return (size * torch.sin(frequency * time + phase)).sum(dim=-1).unflatten(1, (FRAMES, FRAME))


def error(model: ContinuousAutoregressiveWrapper, x: Tensor) -> tuple[float, Tensor]:
    """(root mean square error of the continuation, the continuation)."""
    made = model.generate(x[:, :PROMPT], FRAMES - PROMPT)
    return (made - x[:, PROMPT:]).square().mean().sqrt().item(), made


def main() -> None:
    run = Run(__doc__, steps=800)
    net = ContinuousTransformerWrapper(
        dim_in=FRAME,
        dim_out=FRAME,
        max_seq_len=FRAMES,
        attn_layers=Decoder(dim=64, depth=3, heads=4, attn_dim_head=16, rotary_pos_emb=True, use_rmsnorm=True),
    )
    model = ContinuousAutoregressiveWrapper(net)
    x = waves(200)
    run.train(model, lambda: model(waves(64)), share=0.85, muon=net.muon_parameters(), says='next vector')
    forced, _ = error(model, x)
    run.train(model, lambda: model(waves(64), rollout_steps=4), share=0.15, lr=3e-4, says='rollouts')
    rolled, made = error(model, x)
    zero = x[:, PROMPT:].square().mean().sqrt()

    drawn, axes = figure(3, 1, width=7.5, height=4.2)
    for axis, real, said in zip(axes.flat, x, made, strict=False):
        axis.plot(real.flatten().numpy(), color='0.75', linewidth=4)
        axis.plot(range(PROMPT * FRAME, FRAMES * FRAME), said.flatten().numpy(), color='C3')
        axis.axvline(PROMPT * FRAME - 0.5, color='0.5', linestyle=':')
        axis.set_ylim(-2.1, 2.1)
    name_beside(axes[0, 0], 'the wave', 'continued by the model')
    run.picture(drawn)
    run.check(
        'root mean square error of 32 values', rolled, at_most=float(0.4 * zero),
        baseline=f'before the rollouts {forced:.3f}, always saying zero {zero:.3f}',
    )  # fmt: skip


if __name__ == '__main__':
    main()
