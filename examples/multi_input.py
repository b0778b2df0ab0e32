"""A melody whose notes have a pitch and a length: two tokens per position, and predictions of both.

The next pitch follows from pitch and length together; a length is the pitch's favourite one in seven of ten notes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import Decoder, MultiInputTransformerWrapper

PITCHES, LENGTHS, NOTES, BATCH = 12, 4, 24, 32
Melodies = dict[str, Tensor]


def melodies(rows: int) -> Melodies:
    pitch, pitches, lengths = torch.randint(PITCHES, (rows,)), [], []
    for _ in range(NOTES):
        length = torch.where(torch.rand(rows) < 0.6, pitch % LENGTHS, torch.randint(LENGTHS, (rows,)))
        pitches.append(pitch)
        lengths.append(length)
        pitch = (pitch + 1 + length) % PITCHES
    return {'pitch': torch.stack(pitches, dim=1), 'length': torch.stack(lengths, dim=1)}


def predicts(names: tuple[str, ...]) -> MultiInputTransformerWrapper:
    layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, use_rmsnorm=True)
    sizes = {'pitch': PITCHES, 'length': LENGTHS}
    return MultiInputTransformerWrapper(num_tokens={name: sizes[name] for name in names}, max_seq_len=NOTES, attn_layers=layers)


def logits_and_targets(model: MultiInputTransformerWrapper, notes: Melodies) -> dict[str, tuple[Tensor, Tensor]]:
    logits = model({name: notes[name][:, :-1] for name in model.num_tokens})
    return {name: (logits[name], notes[name][:, 1:]) for name in logits}


def main() -> None:
    run = Run(__doc__, steps=800)
    tests = melodies(200)
    right = {}
    for says, names in (('both', ('pitch', 'length')), ('pitch alone', ('pitch',))):
        model = predicts(names)

        def loss(model: MultiInputTransformerWrapper = model) -> Tensor:
            pairs = logits_and_targets(model, melodies(BATCH)).values()
            return sum((F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits, targets in pairs), torch.zeros(()))

        run.train(model, loss, share=0.5, says=says)
        with torch.no_grad():
            pairs = logits_and_targets(model, tests)
        right[says] = {name: (logits.argmax(-1) == ids).float().mean().item() for name, (logits, ids) in pairs.items()}

    made, axes = figure(1, 1, width=4, height=2.6)
    shares = [right['both']['pitch'], right['pitch alone']['pitch'], right['both']['length']]
    axes[0][0].bar(['pitch, from both', 'pitch, from pitch', 'length, from both'], shares, color=['C0', 'C1', 'C2'])
    axes[0][0].set(ylabel='right', ylim=(0, 1.02))
    axes[0][0].tick_params(labelsize=8)
    run.picture(made)
    print(f'lengths put right: {right["both"]["length"]:.2f}, of which 0.70 can be known')
    alone = right['pitch alone']['pitch']
    run.check('next pitches put right', right['both']['pitch'], at_least=0.98, baseline=f'from pitches alone {alone:.2f}')


if __name__ == '__main__':
    main()
