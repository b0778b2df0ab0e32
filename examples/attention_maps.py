"""Attention maps are there for whoever reads them, and cost nothing otherwise; gradients flow through them."""

from __future__ import annotations

import torch

from x_transformers import Encoder, TransformerWrapper


def main() -> None:
    torch.manual_seed(0)
    model = TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=Encoder(dim=64, depth=2, heads=2))
    ids = torch.randint(100, (1, 12))
    _, intermediates = model(ids, return_intermediates=True)
    for number, layer in enumerate(intermediates.attn_intermediates):
        weights = layer.post_softmax_attn  # (1, 2, 12, 12): batch, heads, queries, keys
        print(f'layer {number}: the first token looks most at position {weights[0, :, 0].argmax(dim=-1).tolist()} (per head)')
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, 12))


if __name__ == '__main__':
    main()
