"""Encoder and decoder learn to copy a sequence of digits: a minute of reading, some seconds of training."""

from __future__ import annotations

import torch

from x_transformers import XTransformer

LENGTH, DIGITS, START = 8, 10, 10


def main(steps: int = 150) -> float:
    torch.manual_seed(0)
    model = XTransformer(
        dim=64,
        enc_num_tokens=DIGITS,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=LENGTH,
        dec_num_tokens=DIGITS + 1,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=LENGTH + 1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        source = torch.randint(DIGITS, (32, LENGTH))
        target = torch.cat((torch.full((32, 1), START), source), dim=1)
        loss = model(source, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f'step {step}: loss {loss.item():.3f}')

    source = torch.randint(DIGITS, (16, LENGTH))
    copied = model.generate(source, torch.full((16, 1), START), LENGTH, temperature=0.0)
    right = (copied == source).float().mean().item()
    print(f'{100 * right:.0f} % of the digits are copied')
    return right


if __name__ == '__main__':
    main()
