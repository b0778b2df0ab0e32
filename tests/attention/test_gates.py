from __future__ import annotations

import pytest
import torch

from x_transformers.attention.attention import Attention
from x_transformers.attention.gates import gate_channels

B, N, D, H, W, E = 2, 5, 12, 2, 6, 4


def run(**flags):
    torch.manual_seed(0)
    attn = Attention(D, heads=H, dim_head=W, value_dim_head=E, **flags).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(B, N, D, dtype=torch.float64)
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


def low_rank(gate, t, silu):
    narrow = t @ gate.down.weight.T
    return (narrow * narrow.sigmoid() if silu else narrow) @ gate.up.weight.T


@pytest.mark.parametrize('silu', [False, True])
def test_gates_of_low_rank_by_hand(silu):
    flags = {'gate_values': True, 'gate_values_rank': 3, 'output_gate': True, 'output_gate_rank': 5}
    attn, x, out, heads = run(**flags, low_rank_silu_gates=silu)
    flat = heads.flatten(2)
    logits = low_rank(attn.to_v_gate, x, silu) + low_rank(attn.to_output_gate, flat, silu)
    torch.testing.assert_close(out, attn.to_out(flat * logits.sigmoid()))


def test_gates_per_head_by_hand():
    flags = {'gate_values': True, 'gate_values_headwise': True, 'output_gate': True, 'output_gate_headwise': True}
    attn, x, out, heads = run(**flags, swiglu_values=True)
    flat = heads.flatten(2)
    logits = x @ attn.to_v_gate.weight.T + flat @ attn.to_output_gate.weight.T
    gated = torch.stack([heads[:, :, h] * torch.nn.functional.silu(logits[..., h : h + 1]) for h in range(H)], dim=2)
    torch.testing.assert_close(out, attn.to_out(gated.flatten(2)))


def test_a_narrow_gate_and_a_gate_per_channel_are_added_up():
    attn, x, out, heads = run(gate_values=True, gate_values_headwise=True, output_gate=True)
    flat = heads.flatten(2)
    wide = (x @ attn.to_v_gate.weight.T).repeat_interleave(E, dim=-1)
    torch.testing.assert_close(out, attn.to_out(flat * (wide + flat @ attn.to_output_gate.weight.T).sigmoid()))


def test_later_gates_start_half_open_and_that_of_2_16_1_open():
    later = ({'gate_values_rank': 3}, {'gate_values_headwise': True}, {'output_gate': True})
    for more in later:
        attn = Attention(D, heads=H, dim_head=W, gate_values=True, **more)
        assert not any('gate' in name and 'bias' in name for name in attn.state_dict())
        merged, x = torch.ones(B, N, H * W), torch.randn(B, N, D)
        gated = gate_channels(merged, x, attn.to_v_gate, attn.to_output_gate, heads=H, silu=attn.gate_is_silu)
        assert torch.equal(gated, torch.full((B, N, H * W), 0.5))
    assert Attention(D, heads=H, dim_head=W, gate_values=True).to_v_gate.bias is not None


def test_gates_read_the_input_of_queries_where_views_differ():
    attn = Attention(
        D, heads=H, dim_head=W, qkv_receive_diff_residuals=True, gate_values=True, gate_values_rank=3, gate_value_heads=True
    )
    for p in attn.parameters():
        torch.nn.init.normal_(p)
    views = torch.randn(3, B, N, D)
    _, inter = attn(views, return_intermediates=True)
    heads = inter.post_softmax_attn @ attn.to_v(views[2]).unflatten(-1, (H, W)).transpose(1, 2)
    heads = heads * attn.to_v_head_gate(views[0]).sigmoid().transpose(1, 2).unsqueeze(-1)
    wanted = attn.to_out(heads.transpose(1, 2).flatten(2) * attn.to_v_gate(views[0]).sigmoid())
    torch.testing.assert_close(attn(views), wanted)


def test_no_output_projection():
    attn = Attention(D, heads=3, dim_head=4, project_out=False)
    x = torch.randn(B, N, D)
    out, inter = attn(x, return_intermediates=True)
    v = attn.to_v(x).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(out, (inter.post_softmax_attn @ v).transpose(1, 2).flatten(2))
    assert not [name for name in attn.state_dict() if name.startswith('to_out')]


def test_one_head_is_projected_whatever_its_width():
    assert Attention(D, heads=1, dim_head=D).to_out.weight.shape == (D, D)
    assert Attention(D, heads=1, dim_head=7, project_out=True, zero_init_output=True)(torch.randn(B, N, D)).shape == (B, N, D)


@pytest.mark.parametrize('flags', [{'dim_head': 5}, {'dim_head': 4, 'out_bias': True}, {'dim_head': 4, 'on_attn': True}])
def test_no_output_projection_where_one_is_needed(flags):
    with pytest.raises(ValueError, match='project_out'):
        Attention(D, heads=3, project_out=False, **flags)
