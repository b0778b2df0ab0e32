"""Pre-training on what random machines write: the model learns to learn a sequence while reading it (https://arxiv.org/abs/2506.20057)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.drawing import name_beside
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper

TOKENS, LENGTH, BATCH, MACHINES = 16, 48, 32, 16


def written_by_fresh_machines() -> Tensor:
    """Sequences of machines that were never trained on, ``b n``."""
    machine = SyntheticDataGenerator(32, TOKENS, max_seq_len=LENGTH, use_gru=True)
    rows = []
    for _ in range(MACHINES):
        machine.reset_()
        rows.append(machine.generate(2 * LENGTH, seed=torch.randint(TOKENS, (16, 8))))
    return torch.cat(rows)


def unigram_bits(seq: Tensor) -> float:
    """Entropy of a token given how often each occurs in its own sequence, which is not known before its end."""
    share = F.one_hot(seq, TOKENS).float().mean(dim=1)
    return -(share * share.clamp(min=1e-9).log2()).sum(dim=-1).mean().item()


def main() -> None:
    run = Run(__doc__, steps=500)
    # shifted tokens: each place also sees the one before, which is half of what looking up repetitions takes
    layers = Decoder(dim=64, depth=2, heads=2, rotary_pos_emb=True, shift_tokens=1, use_rmsnorm=True)
    model = TransformerWrapper(num_tokens=TOKENS, max_seq_len=LENGTH, use_abs_pos_emb=False, attn_layers=layers)
    pretraining = UniversalPretrainWrapper(
        model,
        SyntheticDataGenerator(32, TOKENS, max_seq_len=LENGTH, use_gru=True),
        buffer_size=256,
        batch_size=BATCH,
        seq_len=LENGTH,
        reset_turing_machine_every=1,
    )
    run.train(model, pretraining, lr=3e-3)

    tests = written_by_fresh_machines()
    with torch.no_grad():
        logits = model(tests[:, :-1])
    bits = F.cross_entropy(logits.transpose(1, 2), tests[:, 1:], reduction='none') / math.log(2)
    baseline = unigram_bits(tests)

    made, axes = figure(1, 1, width=7.0, height=2.8)
    axes[0][0].plot(range(1, LENGTH), bits.mean(dim=0), label='model')
    axes[0][0].axhline(baseline, color='grey', linestyle='--', label="entropy of the sequence's own tokens")
    axes[0][0].axhline(math.log2(TOKENS), color='lightgrey', linestyle=':', label='guessing')
    axes[0][0].set(xlabel='place in the sequence', ylabel='bits per token', ylim=(0, None))
    name_beside(axes[0][0])
    run.picture(made)
    others = f'counting tokens within each sequence reaches {baseline:.2f}, guessing {math.log2(TOKENS):.0f}'
    run.check('bits per token on fresh machines', bits.mean(), at_most=0.8 * baseline, baseline=others)


if __name__ == '__main__':
    main()
