"""Running parity: after every bit, say whether the number of ones so far is odd; learnt on 16 bits, tested on 100.

The decoder writes its answers between the bits, so each answer needs the last one and one new bit. `shift_tokens=1` hands
every layer half of the features of the token before, which makes that a rule without positions: it holds at any length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper

BITS, TEST_BITS, ODD = 16, 100, 2  # tokens: 0 and 1 are bits, 2 + parity the answers


def sequences(rows: int, bits: int) -> Tensor:
    """bit, answer, bit, answer, ... (b 2·bits)."""
    bit = torch.randint(2, (rows, bits))
    return torch.stack((bit, ODD + bit.cumsum(dim=1) % 2), dim=-1).flatten(1)


@torch.no_grad()
def answers(model: TransformerWrapper, bit: Tensor) -> Tensor:
    """Bit by bit, with a cache: what the model answers after each when it sees its own earlier answers."""
    cache, said = None, []
    for t in range(bit.shape[1]):
        new = bit[:, t : t + 1] if t == 0 else torch.stack((said[-1], bit[:, t]), dim=1)
        logits, cache = model(new, cache=cache, input_not_include_cache=True, return_intermediates=True)
        said.append(logits[:, -1].argmax(dim=-1))
    return torch.stack(said, dim=1)


def main() -> None:
    run = Run(__doc__, steps=400)
    model = TransformerWrapper(
        num_tokens=4,
        max_seq_len=2 * TEST_BITS,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=64, depth=1, heads=4, shift_tokens=1),
    )

    def loss() -> Tensor:
        x = sequences(64, BITS)
        logits = model(x)[:, 0::2]  # after every bit
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1::2].flatten())

    run.train(model, loss)

    x = sequences(200, TEST_BITS)
    right = answers(model, x[:, 0::2]) == x[:, 1::2]
    print(f'all {BITS} answers right: {right[:, :BITS].all(dim=1).float().mean():.3f} of the rows')
    run.check(
        f'share of rows with all {TEST_BITS} answers right', right.all(dim=1).float().mean(), at_least=0.98,
        baseline='guessing gets each single answer with 0.5',
    )  # fmt: skip


if __name__ == '__main__':
    main()
