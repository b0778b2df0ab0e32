"""Positions under a compiler and an exporter that keep the length of the sequence open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper

POSITIONS: list[dict[str, Any]] = [
    {'rotary_pos_emb': True},
    {'rotary_xpos': True},
    {'polar_pos_emb': True},
    {'alibi_pos_bias': True},
    {'rel_pos_bias': True},
    {'dynamic_pos_bias': True},
]
pytestmark = pytest.mark.filterwarnings('ignore')


def model(**flags: Any) -> nn.Module:
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, verbose=False, **flags)
    return TransformerWrapper(num_tokens=11, max_seq_len=64, use_abs_pos_emb=False, attn_layers=stack).eval()


def ids(length: int) -> Tensor:
    return torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(length))


# what compiles for longer than a second or two is for the deep tests
def in_depth(*kept: int) -> list[Any]:
    return [
        pytest.param(flags, marks=[] if nth in kept else pytest.mark.deep, id=str(flags)) for nth, flags in enumerate(POSITIONS)
    ]


@pytest.mark.parametrize('flags', in_depth(0, 4))
def test_export_keeps_the_length_open(flags: dict[str, Any]) -> None:
    net = model(**flags)
    length = torch.export.Dim('length', min=2, max=63)
    program = torch.export.export(net, (ids(12),), dynamic_shapes={'x': {1: length}}, strict=False).module()
    for n in (2, 12, 37):
        torch.testing.assert_close(program(ids(n)), net(ids(n)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('flags', in_depth(0))
def test_few_graphs_serve_all_lengths(flags: dict[str, Any]) -> None:
    net, graphs = model(**flags), []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=count)
    with torch.no_grad():
        for n in range(6, 56, 5):
            torch.testing.assert_close(compiled(ids(n)), net(ids(n)), atol=1e-5, rtol=1e-5)
    assert len(graphs) <= 3


@pytest.mark.parametrize('flags', in_depth(0))
def test_a_cached_call_is_one_graph(flags: dict[str, Any]) -> None:
    net, x = model(**flags), ids(9)
    compiled = torch.compile(net, fullgraph=True, backend='eager')
    torch.compiler.reset()
    with torch.no_grad():
        cache = net(x[:, :5], return_intermediates=True)[1]
        for at in range(5, 7):
            given = {'return_intermediates': True, 'input_not_include_cache': True}
            out, cache = compiled(x[:, at : at + 1], cache=cache, **given)
            torch.testing.assert_close(out, net(x[:, : at + 1])[:, -1:], atol=1e-5, rtol=1e-5)
