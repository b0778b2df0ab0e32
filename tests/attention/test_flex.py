"""How often FlexAttention is compiled and its masks are made. Here its compiled forms are run by torch as they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from tests.graphs import Graphs
from x_transformers import Decoder
from x_transformers.attention.kernels import flex
from x_transformers.attention.kernels.choose import use_kernel


@pytest.fixture
def graphs(monkeypatch):
    torch.compiler.reset()
    counted = Graphs()
    made = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=counted)
    monkeypatch.setattr(flex, 'compiled', lambda device: made)
    yield counted
    torch.compiler.reset()


def stack(**flags):
    torch.manual_seed(0)
    return Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, **flags).eval()


def compared(model, *lengths, **more):
    for length in lengths:
        x = torch.randn(2, length, 32)
        with torch.no_grad(), use_kernel('reference'):
            want = model(x, **more)
        with torch.no_grad(), use_kernel('flex'):
            got = model(x, **more)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [
        {'rotary_pos_emb': True},
        {'rotary_pos_emb': True, 'attn_max_attend_past': 7},
        {'alibi_pos_bias': True},
        {'attn_softclamp_logits': True, 'attn_kv_heads': 1},
    ],
    ids=lambda flags: '-'.join(flags),
)
def test_ten_lengths_are_at_most_three_graphs(flags, graphs):
    compared(stack(**flags), 16, 17, 19, 24, 33, 48, 65, 100, 129, 200)
    assert 1 <= len(graphs) <= 3


@pytest.mark.slow
def test_more_forms_than_torch_keeps_are_told_and_still_compiled(graphs):
    compared(stack(rotary_pos_emb=True), 16)
    with torch._dynamo.config.patch(recompile_limit=1):
        with pytest.warns(UserWarning, match='torch keeps 1 compiled forms of attention, and this is one more'):
            compared(stack(attn_softclamp_logits=True), 16)
        assert len(graphs) == 2


def test_masks_of_a_shape_are_made_once(monkeypatch):
    made = []
    create = torch_flex.create_block_mask
    # torch says only once that this is not compiled, and another test waits for it
    monkeypatch.setattr(torch_flex, '_warn_once', lambda *args, **more: None)
    monkeypatch.setattr(torch_flex, 'create_block_mask', lambda *args, **more: made.append(args) or create(*args, **more))
    flex.distance_mask.cache_clear()
    model = stack(rotary_pos_emb=True, attn_max_attend_past=7)
    compared(model, 16, 16, 24, 16, 24)
    assert len(made) == 2
    # one that depends on tokens is made once for the layers of a call
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    compared(model, 16, mask=mask)
    compared(model, 16, mask=mask)
    assert len(made) == 4
