"""``torch.compile`` without a word about sizes: a few graphs for any number of lengths."""

from __future__ import annotations

import pytest
import torch

from tests.graphs import Graphs
from x_transformers import Attention, AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

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


@pytest.mark.parametrize('name', ['absolute', 'encoder'])
def test_sizes_that_are_all_open(name):
    torch.compiler.reset()
    stack, flags = MODELS[name]
    net = model(stack, **flags).eval()
    compiled = torch.compile(net, backend='eager', dynamic=True, fullgraph=True)
    for shape in ((2, 12), (3, 9)):
        x = torch.randint(0, 32, shape)
        mask = torch.arange(shape[1]).expand(shape) < shape[1] - 2
        torch.testing.assert_close(compiled(x, mask=mask), net(x, mask=mask), atol=1e-5, rtol=0)


B, N = 3, 9
SHOWN = torch.arange(N).expand(B, N) < 6
FIXED = {
    'mask': SHOWN,
    'pos': torch.arange(N).expand(B, N),
    'attn_mask': torch.ones(B, 1, N, N).tril().bool(),
    'sum_embeds': torch.randn(B, N, 32),
    'self_attn_kv_residuals': torch.randn(B, N, 32),
    'condition': torch.randn(B, N, 32),
}


@pytest.mark.parametrize('name', FIXED)
def test_sizes_that_are_open_beside_fixed_ones(name):
    """As where the first calls were without an argument, so that the compiler keeps only the sizes of the others open."""
    torch.compiler.reset()
    net = model(Encoder, use_adaptive_layernorm=name == 'condition').eval()
    x = torch.randint(0, 32, (B, N))
    opened = x.clone()
    for axis in (0, 1):
        torch._dynamo.maybe_mark_dynamic(opened, axis)
    compiled = torch.compile(net, backend='eager', fullgraph=True)
    given = {name: FIXED[name]}
    torch.testing.assert_close(compiled(opened, **given), net(x, **given), atol=1e-5, rtol=0)


def test_attention_by_itself_with_open_sizes():
    torch.compiler.reset()
    layer, x, delta = Attention(32, heads=4, dim_head=8), torch.randn(B, N, 32), torch.randn(B, N, 32)
    compiled = torch.compile(layer, backend='eager', dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=SHOWN, q_delta=delta), layer(x, mask=SHOWN, q_delta=delta), atol=1e-5, rtol=0)


def test_a_model_of_images_that_never_ran():
    torch.compiler.reset()
    layers = Encoder(dim=32, depth=1, heads=4, attn_dim_head=8)
    net, images = ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=layers).eval(), torch.randn(2, 3, 8, 8)
    found = torch.compile(net, backend='eager', fullgraph=True)(images)
    torch.testing.assert_close(found, net(images), atol=1e-5, rtol=0)
