from __future__ import annotations

import pytest
import torch

from x_transformers.attention.attention import Attention

B, N, D, H, W, E = 2, 5, 12, 2, 6, 4


def run(**flags):
    torch.manual_seed(0)
    attn = Attention(D, heads=H, dim_head=W, value_dim_head=E, **flags)
    for p in attn.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(B, N, D)
    out, inter = attn(x, return_intermediates=True)
    v = attn.to_v(x).unflatten(-1, (H, E)).transpose(1, 2)
    return attn, x, out, (inter.post_softmax_attn @ v).transpose(1, 2)


def test_head_scale():
    attn, _, out, heads = run(head_scale=True)
    assert attn.head_scale_params.shape == (1, H, 1, 1)
    torch.testing.assert_close(out, attn.to_out((heads * attn.head_scale_params.reshape(1, 1, H, 1)).flatten(2)))


def test_head_gates():
    attn, x, out, heads = run(gate_value_heads=True)
    gate = attn.to_v_head_gate(x).sigmoid()
    torch.testing.assert_close(out, attn.to_out((heads * gate[..., None]).flatten(2)))


@pytest.mark.parametrize('silu', [False, True])
def test_value_gates(silu):
    attn, x, out, heads = run(gate_values=True, swiglu_values=silu)
    g = attn.to_v_gate(x)
    torch.testing.assert_close(out, attn.to_out(heads.flatten(2) * g.sigmoid() * (g if silu else 1)))


def test_attention_on_attention():
    attn, _, out, heads = run(on_attn=True)
    a, b = attn.to_out[0](heads.flatten(2)).chunk(2, -1)
    torch.testing.assert_close(out, a * b.sigmoid())


def test_gates_start_open():
    attn = Attention(D, heads=H, dim_head=W, gate_values=True, gate_value_heads=True)
    for gate in (attn.to_v_gate, attn.to_v_head_gate):
        assert torch.equal(gate.weight, torch.zeros_like(gate.weight))
        assert torch.equal(gate.bias, torch.full_like(gate.bias, 10.0))


@pytest.mark.parametrize('on_attn', [False, True])
def test_silent_output(on_attn):
    attn = Attention(D, heads=H, dim_head=W, on_attn=on_attn, zero_init_output=True)
    out = attn(torch.randn(B, N, D))
    assert torch.equal(out, torch.zeros_like(out))
    out = attn(torch.randn(B, N, D))
    out.sum().backward()
    weight = attn.to_out[0].weight if on_attn else attn.to_out.weight
    assert weight.grad.abs().sum() > 0


def test_gates_read_the_view_of_the_queries():
    torch.manual_seed(0)
    attn = Attention(D, heads=H, dim_head=W, gate_values=True, gate_value_heads=True, qkv_receive_diff_residuals=True)
    for p in attn.parameters():
        torch.nn.init.normal_(p)
    views = torch.randn(3, B, N, D)
    out, inter = attn(views, return_intermediates=True)
    v = attn.to_v(views[2]).unflatten(-1, (H, W)).transpose(1, 2)
    heads = (inter.post_softmax_attn @ v).transpose(1, 2) * attn.to_v_head_gate(views[0]).sigmoid()[..., None]
    torch.testing.assert_close(out, attn.to_out(heads.flatten(2) * attn.to_v_gate(views[0]).sigmoid()))
    scores = attn.to_q(views[0]).unflatten(-1, (H, W)).transpose(1, 2) @ attn.to_k(views[1]).unflatten(-1, (H, W)).permute(
        0, 2, 3, 1
    )
    torch.testing.assert_close(inter.qk_similarities, scores * W**-0.5)
