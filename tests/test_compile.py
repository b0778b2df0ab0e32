"""``torch.compile`` sees one graph under every flag, ``torch.export`` takes the usual models, numbers stay the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graphs import Graphs
from tests.laws.combination import Combination, singles, tokens
from tests.laws.groups import DECODER, LENGTH
from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

ROWS = 2

pytestmark = [pytest.mark.slow, pytest.mark.deep, pytest.mark.filterwarnings('ignore')]


# every flag in a decoder if it fits one, else in another kind of model
CASES = list({case.names: case for case in sorted(singles(), key=lambda case: case.kind == DECODER)}.values())


def run(model: nn.Module, net: nn.Module, case: Combination) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(what the tokens give, the gradients), with the same random numbers each time."""
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6])[:, None]
    torch.manual_seed(0)
    net.zero_grad()
    out = case.call(model, tokens(ROWS), case.inputs(ROWS).part(), mask=mask)
    weights = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    read = weights * out if case.pooled else (weights * out)[mask]
    read.sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return read.detach(), gradients


@pytest.mark.parametrize('case', CASES, ids=str)
def test_one_graph_and_the_same_numbers(case):
    """Forward with a padding mask, and its gradients. What only acts in training is compiled in training."""
    torch.compiler.reset()
    net = case.build()
    # which layers are dropped is drawn by other means when compiled; that has a test of its own beside the layers
    if any(entry.only_training for entry in case.groups) and 'layer_dropout' not in case.names:
        net.train()
    want, gradients = run(net, net, case)
    graphs = Graphs()
    # the hybrid modules here are recurrent, at which torch breaks the graph unless told otherwise
    with torch._dynamo.config.patch(allow_rnn=True):
        got, compiled_gradients = run(torch.compile(net, fullgraph=True, backend=graphs), net, case)
    assert len(graphs) == 1
    torch.testing.assert_close(got, want)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, msg=lambda text, name=name: f'{name}: {text}')


def exported(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
    model.eval()
    program = torch.export.export(model, args, kwargs, strict=False)
    torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    'flags', [{}, {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'ff_glu': True, 'use_rmsnorm': True}], ids=str
)
def test_decoder_is_exported(flags):
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=4, attn_dim_head=8, **flags)
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    exported(model, torch.randint(0, 11, (2, 9)), mask=mask)


def test_encoder_is_exported():
    torch.manual_seed(0)
    stack = Encoder(dim=16, depth=2, heads=4, attn_dim_head=8, rel_pos_bias=True)
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    exported(model, torch.randint(0, 11, (2, 9)), mask=mask)


def test_vision_model_is_exported():
    torch.manual_seed(0)
    stack = Encoder(dim=16, depth=2, heads=4, attn_dim_head=8)
    model = ViTransformerWrapper(image_size=8, patch_size=4, num_classes=3, attn_layers=stack)
    exported(model, torch.randn(2, 3, 8, 8))
