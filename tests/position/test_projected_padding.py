"""What the projected bias cannot tell apart is refused by name."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper


def test_padding_between_memories_and_tokens_is_refused() -> None:
    layers = Decoder(dim=16, depth=1, heads=2, attn_use_rel_proj_pos_bias=True)
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, max_mem_len=4, attn_layers=layers).eval()
    x, mems = torch.randint(11, (2, 5)), [torch.randn(2, 3, 16)]
    assert model(x, mems=mems).isfinite().all()
    with pytest.raises(ValueError, match='attn_use_rel_proj_pos_bias'):
        model(x, mems=mems, seq_start_pos=torch.tensor([0, 2]))
