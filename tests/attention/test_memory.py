"""What a training step keeps and makes: no score matrix of all heads where a kernel can do without. Bytes, so no noise."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kept import kept_by
from x_transformers import Decoder, TransformerWrapper

pytestmark = pytest.mark.slow

N, HEADS = 2048, 4


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def step(padded: bool, **flags) -> tuple[int, int]:
    """(bytes kept for the backward pass, the largest tensor that a training step of two rows makes)."""
    torch.manual_seed(0)
    stack = Decoder(dim=256, depth=1, heads=HEADS, attn_dim_head=64, **flags)
    model = TransformerWrapper(num_tokens=8, max_seq_len=N, attn_layers=stack)
    mask = torch.arange(N) < torch.tensor([N, N - 300])[:, None] if padded else None
    with Largest() as largest:
        with kept_by(model) as kept:
            loss = model(torch.randint(0, 8, (2, N)), mask=mask).square().mean()
        loss.backward()
    return kept.bytes, largest.bytes


def test_padding_beside_causality_costs_little():
    plain, _ = step(False)
    padded, largest = step(True)
    assert padded <= 1.2 * plain
    # a boolean for each pair of each row and head
    assert largest < 2 * HEADS * N * N


@pytest.mark.parametrize(
    'flags',
    [
        {'alibi_pos_bias': True},
        {'rel_pos_bias': True},
        {'dynamic_pos_bias': True},
        {'attn_num_mem_kv': 4},
        {'attn_softclamp_logits': True},
        {'attn_max_attend_past': 64},
    ],
    ids=str,
)
def test_no_matrix_of_all_pairs(flags):
    """Of the four bytes for each pair and head, less than one more is kept than without the flag, and two made at once."""
    kept, largest = step(False, **flags)
    plain, _ = step(False)
    assert kept - plain < HEADS * N * N
    assert largest < 2 * HEADS * N * N
