"""What would count the padding between memories and tokens is refused by name."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper


@pytest.mark.parametrize(
    ('flag', 'value'), [('attn_use_rel_proj_pos_bias', True), ('attn_path', True), ('attn_max_attend_past', 2)]
)
def test_padding_between_memories_and_tokens_is_refused(flag: str, value: bool | int) -> None:
    layers = Decoder(dim=16, depth=1, heads=2, **{flag: value})
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, max_mem_len=4, attn_layers=layers).eval()
    x, mems, starts = torch.randint(11, (2, 5)), [torch.randn(2, 3, 16)], torch.tensor([0, 2])
    assert model(x, mems=mems).isfinite().all()
    torch.testing.assert_close(model(x, seq_start_pos=starts)[1:, 2:], model(x[1:, 2:]))
    with pytest.raises(ValueError, match=flag):
        model(x, mems=mems, seq_start_pos=starts)
