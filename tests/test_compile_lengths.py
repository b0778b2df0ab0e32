"""``torch.compile`` without a word about sizes: a few graphs for any number of lengths."""

from __future__ import annotations

import pytest
import torch

from tests.graphs import Graphs
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

LENGTHS = (5, 8, 13, 21, 34, 55, 64, 89, 100, 144)
MODELS = {
    'absolute': (Decoder, {}),
    'rotary': (Decoder, {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'use_rmsnorm': True, 'ff_glu': True}),
    'alibi': (Decoder, {'alibi_pos_bias': True}),
    't5': (Decoder, {'rel_pos_bias': True}),
    'window': (Decoder, {'rotary_pos_emb': True, 'attn_max_attend_past': 7}),
    'softclamp': (Decoder, {'attn_softclamp_logits': True}),
    'encoder': (Encoder, {'rotary_pos_emb': True}),
}


def model(stack, **flags):
    torch.manual_seed(0)
    layers = stack(dim=32, depth=2, heads=4, attn_dim_head=8, verbose=False, **flags)
    return TransformerWrapper(num_tokens=32, max_seq_len=256, attn_layers=layers)


@pytest.mark.parametrize('name', MODELS)
def test_ten_lengths_are_at_most_three_graphs(name):
    torch.compiler.reset()
    stack, flags = MODELS[name]
    net, graphs = model(stack, **flags).eval(), Graphs()
    compiled = torch.compile(net, backend=graphs, dynamic=None, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            x = torch.randint(0, 32, (2, length))
            torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=0)
    assert 1 <= len(graphs) <= 3


def test_so_is_training():
    torch.compiler.reset()
    wrapper, graphs = AutoregressiveWrapper(model(Decoder, rotary_pos_emb=True)), Graphs()
    compiled = torch.compile(wrapper, backend=graphs, dynamic=None, fullgraph=True)
    for length in LENGTHS:
        x = torch.randint(0, 32, (2, length))
        loss = compiled(x)
        loss.backward()
        torch.testing.assert_close(loss, wrapper(x), atol=1e-5, rtol=0)
    assert 1 <= len(graphs) <= 3
