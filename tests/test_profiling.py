from __future__ import annotations

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper
from x_transformers.profiling import annotate


def model():
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, use_rmsnorm=True)
    return TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=stack)


def counts(net, x, **options):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, annotate(net, **options):
        out = net(x)
    return out, {event.key: event.count for event in profile.key_averages() if event.key.startswith('module: ')}


def test_every_module_is_named_as_often_as_it_runs():
    net, x = model(), torch.arange(8)[None]
    out, seen = counts(net, x)
    torch.testing.assert_close(out, net(x), rtol=0, atol=0)
    assert seen['module: Attention'] == seen['module: Attend'] == seen['module: FeedForward'] == 2
    assert seen['module: RMSNorm'] == 5
    assert seen['module: TransformerWrapper'] == seen['module: Decoder'] == seen['module: LinearLogits'] == 1
    assert seen['module: TokenEmbedding'] == 1


def test_paths_tell_layers_apart():
    _, seen = counts(model(), torch.arange(8)[None], paths=True)
    assert seen['module: Attention attn_layers.layers.0.1'] == seen['module: Attention attn_layers.layers.2.1'] == 1


def test_nothing_is_left_behind_even_after_an_error():
    net = model()
    before = [dict(vars(module)) for module in net.modules()]
    with pytest.raises(IndexError), annotate(net):
        net(torch.full((1, 4), 99))
    assert [dict(vars(module)) for module in net.modules()] == before
