"""Gradients of gradients, forward mode and transforms of torch.func, by default and with every kernel that a CPU has."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper
from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels import block_steps
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.attention.mask import Mask
from x_transformers.position.relative import AlibiPositionalBias, RelativeBias

H, N, D = 4, 9, 8
CASES = {
    'causal': {},
    'grouped keys': {'kv_heads': 2},
    'one key head': {'kv_heads': 1},
    'padding': {'padding': True},
    'bias by distance': {'bias': True},
    'window': {'past': 2},
    'soft clamp': {'kernel': 'blocks', 'softclamp_logits': True, 'logit_softclamp_value': 2.0},
    'sink': {'kernel': 'blocks', 'head_learned_sink': True},
    'sigmoid': {'kernel': 'blocks', 'sigmoid': True},
    'largest': {'kernel': 'blocks', 'sparse_topk': 2},
    'heads talk': {
        'kernel': 'blocks', 'pre_talking_heads': True, 'post_talking_heads': True, 'pre_scale_post_talking_heads': True,
    },
}  # fmt: skip


def second(kernel, kv_heads=H, padding=False, bias=False, past=None, **settings):
    """The gradient of the size of a gradient, in queries, keys and values."""
    torch.manual_seed(0)
    attend = Attend(heads=H, causal=True, **settings).double()
    for parameter in attend.parameters():
        torch.nn.init.normal_(parameter)
    q = torch.randn(2, H, N, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keys = torch.arange(N)[None] >= torch.tensor([[0], [3]]) if padding else None
    added = RelativeBias(AlibiPositionalBias(H).double()) if bias else None
    with use_kernel(kernel):
        mask = Mask(keys=keys).narrowed(True, past)
        out, _ = attend.run(q, k, v, mask=mask, geometry=ScoreShape(N, N), bias=added)
    first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), (q, k, v))


@pytest.mark.parametrize('case', CASES)
def test_second_gradients_are_those_of_the_reference(case, monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    settings = dict(CASES[case])
    kernels = (settings.pop('kernel'),) if 'kernel' in settings else ('sdpa', 'blocks')
    expected = second('reference', **settings)
    for kernel in kernels:
        for found, right in zip(second(kernel, **settings), expected, strict=True):
            torch.testing.assert_close(found, right)


# torch loads its own decompositions for forward mode by a deprecated function
@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*')
@pytest.mark.parametrize(
    'flags', [{}, {'use_rmsnorm': True}, {'attn_softclamp_logits': True}, {'num_residual_streams': 2}], ids=str
)
def test_models_have_second_gradients_and_forward_mode(flags):
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=1, heads=2, **flags)
    net = TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=stack).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids, x = torch.randint(0, 24, (2, 6)), torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)

    def loss(t):
        return net(ids, sum_embeds=t).square().sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * direction).sum(), x)
    value, slope = torch.func.jvp(loss, (x.detach(),), (direction,))
    torch.testing.assert_close(slope, (gradient * direction).sum().detach())
    torch.testing.assert_close(value, loss(x).detach())
    _, of_gradient = torch.func.jvp(torch.func.grad(loss), (x.detach(),), (direction,))
    torch.testing.assert_close(of_gradient, curvature)
    each = torch.func.vmap(torch.func.grad(lambda t: net(ids[:1], sum_embeds=t[None]).square().sum()))(x.detach()[:1])
    torch.testing.assert_close(each[0], gradient.detach()[0])


def test_a_gradient_is_taken_once_where_nobody_asks_for_more():
    """The usual backward is torch's own, to the bit."""
    torch.manual_seed(0)
    q = torch.randn(2, H, N, D, requires_grad=True)
    out, _ = Attend(causal=True)(q, q, q)
    plain = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(out, plain)
    assert torch.equal(*(torch.autograd.grad(t.square().sum(), q)[0] for t in (out, plain)))
