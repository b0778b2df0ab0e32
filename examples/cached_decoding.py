"""What a cache can do beyond appending: the past is read once, then several continuations are tried and taken back."""

from __future__ import annotations

import torch

from x_transformers import Decoder, TransformerWrapper


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = TransformerWrapper(
        num_tokens=100, max_seq_len=256, attn_layers=Decoder(dim=64, depth=2, heads=2, rotary_pos_emb=True)
    ).eval()
    past = torch.randint(100, (1, 50))
    _, cache = model(past, return_intermediates=True)

    for _ in range(3):
        draft = torch.randint(100, (1, 4))
        with_cache, _ = model(draft, cache=cache, return_intermediates=True)  # the cache itself does not change
        without = model(torch.cat((past, draft), dim=1))[:, -4:]
        print(f'4 new tokens, cached and uncached differ by at most {(with_cache - without).abs().max():.1e}')
        torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=1e-4)


if __name__ == '__main__':
    main()
