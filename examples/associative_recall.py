"""Associative recall: key, value, key, value, ... and then keys again: which value belonged to each? One layer has to do.

To find a key's value one layer must match the question with the key, which stands one place before the value. A plain layer
cannot look at two places at once; with `shift_tokens=1` the value's place carries its key too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper

PAIRS, WORDS = 8, 32  # tokens: keys 0 … 31, values 32 … 63


def sequences(rows: int) -> Tensor:
    """Eight pairs, and the same pairs in another order (b 32)."""
    keys = torch.rand(rows, WORDS).argsort(dim=1)[:, :PAIRS]
    values = WORDS + torch.randint(WORDS, (rows, PAIRS))
    pairs = torch.stack((keys, values), dim=-1)
    order = torch.rand(rows, PAIRS).argsort(dim=1)
    again = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    return torch.cat((pairs, again), dim=1).flatten(1)


def asked(model: TransformerWrapper, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the keys of the second half, and the values that follow them."""
    return model(x)[:, 2 * PAIRS :: 2], x[:, 2 * PAIRS + 1 :: 2]


def accuracy(run: Run, **flags: int) -> float:
    torch.manual_seed(0)
    model = TransformerWrapper(
        num_tokens=2 * WORDS,
        max_seq_len=4 * PAIRS,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=128, depth=1, heads=2, rotary_pos_emb=True, **flags),
    )

    def loss() -> Tensor:
        logits, values = asked(model, sequences(64))
        return F.cross_entropy(logits.flatten(0, 1), values.flatten())

    run.train(model, loss, share=0.5, says=', '.join(f'{name}={value}' for name, value in flags.items()) or 'no flag')
    with torch.no_grad():
        logits, values = asked(model, sequences(500))
    return (logits.argmax(dim=-1) == values).float().mean().item()


def main() -> None:
    run = Run(__doc__, steps=1200)
    plain = accuracy(run)
    shifted = accuracy(run, shift_tokens=1)
    run.check(
        'recall with shift_tokens=1', shifted, at_least=0.95, baseline=f'without it {plain:.3f}, and any value seen 0.125'
    )


if __name__ == '__main__':
    main()
