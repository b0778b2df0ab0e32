"""The stack's loop and its keywords."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers.cache.kv_cache import KVCache
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.layers.stack import AttentionLayers, CrossAttender, Decoder, Encoder, PrefixDecoder
from x_transformers.module import reset_parameters

DIM = 12
SMALL: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 6, 'verbose': False}


def built(cls: type[AttentionLayers], **flags: Any) -> Any:
    """A stack in double precision with every parameter drawn, so that nothing is silent."""
    torch.manual_seed(0)
    stack = cls(**{**SMALL, **flags}).double().eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return stack


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


# ---------------------------------------------------------------- the loop


def test_pre_norm_by_hand() -> None:
    stack, x = built(Decoder), drawn(2, 5, DIM)
    h = x
    for norms, branch, residual in stack.layers:
        assert norms[1] is None
        assert norms[2] is None
        h = branch(norms[0](h)) + h
        assert not list(residual.parameters())
    torch.testing.assert_close(stack(x), stack.final_norm(h))


def test_sandwich_and_post_norm_by_hand() -> None:
    x = drawn(2, 5, DIM)
    stack, h = built(Encoder, sandwich_norm=True), x
    for norms, branch, _ in stack.layers:
        h = norms[1](branch(norms[0](h))) + h
    torch.testing.assert_close(stack(x), stack.final_norm(h))
    stack, h = built(Encoder, pre_norm=False), x
    for norms, branch, _ in stack.layers:
        assert norms[0] is None
        h = norms[2](branch(h) + h)
    torch.testing.assert_close(stack(x), h)


def test_branches_without_a_norm_before_them_by_hand() -> None:
    x = drawn(2, 5, DIM)
    stack, h = built(Encoder, sandwich_norm=True, norm_before=(False, True)), x
    for index, (norms, branch, _) in enumerate(stack.layers):
        assert (norms[0] is None) is (index % 2 == 0)
        h = norms[1](branch(norms[0](h) if index % 2 else h)) + h
    torch.testing.assert_close(stack(x), stack.final_norm(h))


def test_unet_lime_and_injection_by_hand() -> None:
    x = drawn(2, 5, DIM)
    stack = built(
        Encoder, unet_skips=True, macaron=True, integrate_layers=True, reinject_input=True, learned_reinject_input_gate=True
    )
    injected = stack.reinject_input_proj(x) * stack.learned_reinject_input_gate(x).sigmoid()
    h, skips, seen = x, [], []
    for index, (norms, branch, _) in enumerate(stack.layers):
        skips.append(h)
        if index == 3:
            h = stack.skip_combines[3].combine(torch.cat((skips[0], h), dim=-1))
        seen.append(h)
        entering = stack.layer_integrators[index](h, seen)
        h = branch(norms[0](entering + injected)) + h
    assert stack.layer_integrators[1].num_views == 1
    assert stack.layer_integrators[4].num_views == 3
    torch.testing.assert_close(stack(x), stack.final_norm(h))


def test_softclamped_output_and_no_final_norm() -> None:
    x = drawn(2, 5, DIM)
    stack = built(Encoder, softclamp_output=True, softclamp_output_value=2.0, pre_norm_has_final_norm=False)
    plain = built(Encoder, pre_norm_has_final_norm=False)
    torch.testing.assert_close(stack(x), 2 * (plain(x) / 2).tanh())


def test_streams_with_views_by_hand() -> None:
    x = drawn(2, 5, DIM)
    stack = built(Decoder, num_residual_streams=3, qkv_receive_diff_residuals=True)
    h = (x[:, None] + stack.stream_emb[:, None]).flatten(0, 1)
    for norms, branch, path in stack.layers:
        seen, rest = path.read(h)
        h = path.write(branch(norms[0](seen)), rest)
    torch.testing.assert_close(stack(x), stack.final_norm(h.view(2, 3, 5, DIM).sum(dim=1)))


def test_value_residual_and_residual_attention_hand_on() -> None:
    x = drawn(2, 5, DIM)
    stack = built(Encoder, add_value_residual=True, residual_attn=True)
    (n0, a0, _), (n1, f1, _), (n2, a2, _), (n3, f3, _) = stack.layers
    out, first = a0(n0[0](x), return_intermediates=True)
    h = out + x
    h = f1(n1[0](h)) + h
    h = a2(n2[0](h), value_residual=first.values, prev_attn=first.pre_softmax_attn) + h
    h = f3(n3[0](h)) + h
    torch.testing.assert_close(stack(x), stack.final_norm(h))
    assert 'layers.0.1.to_value_residual_mix.0.weight' not in stack.state_dict()
    assert 'layers.2.1.to_value_residual_mix.0.weight' in stack.state_dict()


# ---------------------------------------------------------------- names


def test_names_of_the_state_dict_in_order() -> None:
    stack = Decoder(
        **{**SMALL, 'depth': 1},
        macaron=True,
        shift_tokens=1,
        use_layerscale=True,
        scale_residual=True,
        reinject_input=True,
        learned_reinject_input_gate=True,
        rotary_xpos=True,
        alibi_pos_bias=True,
    )
    ff = ['1.gamma', '1.fn.fn.fn.ff.0.0.weight', '1.fn.fn.fn.ff.0.0.bias', '1.fn.fn.fn.ff.2.weight', '1.fn.fn.fn.ff.2.bias']
    attention = ['1.gamma', *(f'1.fn.fn.to_{name}.weight' for name in ('q', 'k', 'v', 'out'))]
    assert list(stack.state_dict()) == [
        *(f'layers.{i}.{key}' for i in range(3) for key in ('0.0.gamma', *(attention if i == 1 else ff), '2.residual_scale')),
        'final_norm.gamma',
        'reinject_input_proj.weight',
        'learned_reinject_input_gate.weight',
        'rotary_pos_emb.inv_freq',
        'rotary_pos_emb.scale',
    ]


def test_names_of_streams_lime_unet_and_conditions() -> None:
    keys = list(
        Encoder(**SMALL, num_residual_streams=2, integrate_layers=True, unet_skips=True, rel_pos_bias=True).state_dict()
    )
    assert keys[0] == 'stream_emb'
    assert [key for key in keys if key.startswith('layers.0.2.')] == [
        f'layers.0.2.{name}'
        for name in (
            'static_beta',
            'static_alpha',
            'dynamic_alpha_fn',
            'dynamic_alpha_scale',
            'dynamic_beta_fn',
            'dynamic_beta_scale',
            'norm.weight',
        )
    ]
    assert [key for key in keys if key.startswith('layer_integrators.3.')] == [
        f'layer_integrators.3.to_weights.{name}' for name in ('0.g', '1.weight', '1.bias')
    ]
    assert 'skip_combines.2.combine.weight' in keys
    assert 'rel_pos.relative_attention_bias.weight' in keys
    adaptive = Encoder(
        **SMALL, use_adaptive_layernorm=True, use_adaptive_layerscale=True, dim_condition=3, adaptive_condition_mlp=True
    )
    shapes = {key: tuple(value.shape) for key, value in adaptive.state_dict().items()}
    assert shapes['adaptive_mlp.0.weight'] == (12, 3)
    assert shapes['layers.0.0.0.to_gamma.weight'] == shapes['layers.0.1.to_gamma.weight'] == (DIM, 12)
    assert shapes['final_norm.to_gamma.weight'] == (DIM, 12)


def test_made_on_the_meta_device() -> None:
    flags = {
        'num_residual_streams': 2, 'integrate_layers': True, 'rotary_pos_emb': True, 'use_layerscale': True, 'unet_skips': True,
    }  # fmt: skip
    with torch.device('meta'):
        stack = Decoder(**SMALL, **flags)
    stack = stack.to_empty(device='cpu')
    for tensor in (*stack.parameters(), *stack.buffers()):
        tensor.data.fill_(float('nan'))
    reset_parameters(stack)
    assert all(bool(tensor.isfinite().all()) for tensor in (*stack.parameters(), *stack.buffers()))
    assert bool(stack(torch.randn(1, 4, DIM)).isfinite().all())


def test_attributes_that_others_read() -> None:
    stack = CrossAttender(**SMALL, num_residual_streams=2)
    assert (stack.dim, stack.depth, stack.causal, stack.attn_heads, stack.attn_dim_head) == (DIM, 2, False, 2, 6)
    assert stack.layer_types == ('c', 'f', 'c', 'f')
    assert stack.layers_execute_order == (0, 1, 2, 3)
    assert stack.num_attn_layers == 0
    assert stack.cross_attend
    assert stack.can_cache_kv
    assert not Decoder(**SMALL, attn_selective=True).can_cache_kv
    assert PrefixDecoder(**SMALL).causal is False
    assert Decoder(**SMALL).causal is True
    assert Encoder(**SMALL, weight_tie_layers=True).depth == 1
    assert Encoder(**SMALL, rotary_pos_emb=True).disable_abs_pos_emb
    assert not Encoder(**SMALL).disable_abs_pos_emb


def test_signatures_are_the_flags() -> None:
    assert list(inspect.signature(AttentionLayers).parameters)[:4] == ['dim', 'depth', 'heads', 'causal']
    assert 'causal' not in inspect.signature(Decoder).parameters
    assert 'only_cross' not in inspect.signature(CrossAttender).parameters
    assert inspect.signature(Encoder).parameters['rotary_pos_emb'].default is False
    assert len(inspect.signature(AttentionLayers.forward).parameters) == 1 + 31 + 7

    class Mine(Decoder):
        def __init__(self, width: int) -> None:
            super().__init__(**{**SMALL, 'dim': width})

    assert list(inspect.signature(Mine).parameters) == ['width']


@pytest.mark.parametrize('cls', [Encoder, Decoder, PrefixDecoder])
def test_subclasses_know_causality_themselves(cls: type[AttentionLayers]) -> None:
    with pytest.raises(FlagError, match=f'`causal` must be left out for {cls.__name__}'):
        cls(**SMALL, causal=True)


def test_misspelt_flags() -> None:
    with pytest.raises(UnknownFlag, match=r'unrecognized kwargs.*rotary_pos_emb'):
        Decoder(**SMALL, rotary_pos_embed=True)
    assert CrossAttender(**SMALL, causal=True).causal


# ---------------------------------------------------------------- what came back


def test_return_hiddens() -> None:
    stack, x = built(Decoder, cross_attend=True), drawn(2, 5, DIM)
    context = drawn(2, 3, DIM)
    out, seen = stack(x, context=context, return_hiddens=True)
    torch.testing.assert_close(out, stack(x, context=context))
    assert [inter.layer_type for inter in seen.attn_intermediates] == ['a', 'c', 'a', 'c']
    assert len(seen.hiddens) == 2
    assert torch.equal(seen.hiddens[0], x)
    assert len(seen.layer_hiddens) == 7
    assert seen.last_hidden is out
    assert seen.cache_length == 5
    torch.testing.assert_close(seen.attn_intermediates[0].post_softmax_attn.sum(dim=-1), torch.ones(2, 2, 5).double())
    assert seen.attn_intermediates[1].post_softmax_attn.shape == (2, 2, 5, 3)


def test_a_layer_left_out_shifts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, x = built(Decoder, depth=3, layer_dropout=(0, 0, 0.5, 0, 0, 0), integrate_layers=True), drawn(2, 5, DIM)
    mems = [drawn(2, 2 + nth, DIM) for nth in range(3)]
    shifts, table, ids = drawn(3, 2, 5, DIM), drawn(7, 3, DIM), torch.randint(0, 7, (2, 5))
    given = {'mems': mems, 'self_attn_kv_residuals': shifts, 'deep_embeds_and_ids': (table, ids), 'return_hiddens': True}
    stack.train()
    monkeypatch.setattr(random, 'random', lambda: 0.4)
    got, seen = stack(x, **given)
    silent = copy.deepcopy(stack).eval()
    silent.layers[2].inside.to_out.weight.data.zero_()
    want, whole = silent(x, **given)
    torch.testing.assert_close(got, want)
    assert len(seen.hiddens) == len(whole.hiddens) == 3
    assert len(seen.attn_intermediates) == 3
    assert seen.attn_intermediates[1].values is None
    assert seen.attn_intermediates[1].layer_type == 'a'
    assert seen.kv_cache is None
    torch.testing.assert_close(seen.attn_intermediates[2].values, whole.attn_intermediates[2].values)


def test_layer_dropouts_can_be_changed() -> None:
    stack, x = built(Encoder), drawn(1, 4, DIM)
    stack.layer_dropouts = [1.0] * 4
    torch.testing.assert_close(stack(x), built(Encoder)(x))
    torch.testing.assert_close(stack.train()(x), stack.final_norm(x))


def test_context_tokens_are_dropped_afresh_by_each_layer() -> None:
    stack, x = built(CrossAttender, depth=3, cross_attn_tokens_dropout=0.5).train(), drawn(1, 4, DIM)
    _, seen = stack(x, context=drawn(1, 20, DIM), return_hiddens=True)
    assert [inter.values.shape[-2] for inter in seen.attn_intermediates] == [10, 10, 10]
    assert stack.eval()(x, context=drawn(1, 20, DIM), return_hiddens=True)[1].attn_intermediates[0].values.shape[-2] == 20


# ---------------------------------------------------------------- order


def test_an_order_at_the_call() -> None:
    stack, x = built(Decoder), drawn(2, 5, DIM)
    other = built(Decoder, layers_execute_order=(2, 3, 0, 1, 1))
    other.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack(x, layers_execute_order=(2, 3, 0, 1, 1)), other(x))
    torch.testing.assert_close(other(x, layers_execute_order=(0, 1, 2, 3)), stack(x))
    assert not torch.allclose(stack(x), other(x))


def test_tied_layers() -> None:
    stack, x = built(Encoder, weight_tie_layers=True, depth=3), drawn(2, 5, DIM)
    one = built(Encoder, depth=1)
    one.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack(x), one(x, layers_execute_order=(0, 1) * 3))


def test_hiddens_and_mems_of_streams_have_the_batch_of_x() -> None:
    stack = built(Decoder, num_residual_streams=3, qkv_receive_diff_residuals=True)
    x = drawn(2, 6, DIM)
    _, seen = stack(x, return_hiddens=True)
    assert all(h.shape == (2, 6, DIM) for h in seen.hiddens)
    assert stack(x, mems=seen.hiddens).shape == (2, 6, DIM)


# ---------------------------------------------------------------- masks, positions, memories


def test_mems_are_what_came_before() -> None:
    stack, x = built(Decoder, alibi_pos_bias=True), drawn(2, 7, DIM)
    _, first = stack(x[:, :3], return_hiddens=True)
    torch.testing.assert_close(stack(x[:, 3:], mems=first.hiddens), stack(x)[:, 3:])
    rotary = built(Decoder, rotary_pos_emb=True)
    _, first = rotary(x[:, :3], return_hiddens=True)
    torch.testing.assert_close(rotary(x[:, 3:], mems=first.hiddens), rotary(x)[:, 3:])
    polar = built(Decoder, polar_pos_emb=True)
    _, first = polar(x[:, :3], return_hiddens=True)
    torch.testing.assert_close(polar(x[:, 3:], mems=first.hiddens), polar(x)[:, 3:])


@pytest.mark.parametrize(
    'flags', [{'use_adaptive_layernorm': True}, {'use_adaptive_rmsnorm': True, 'adaptive_condition_mlp': True}]
)
def test_mems_are_normed_with_their_own_condition(flags: dict[str, Any]) -> None:
    stack, x, condition = built(Decoder, **flags), drawn(2, 7, DIM), drawn(2, 7, DIM)
    _, first = stack(x[:, :3], condition=condition[:, :3], return_hiddens=True)
    want = stack(x, condition=condition)[:, 3:]
    torch.testing.assert_close(stack(x[:, 3:], condition=condition, mems=first.hiddens), want)
    shorter = [first.hiddens[0], first.hiddens[1][:, 1:]]
    seen = torch.tensor([[False, True, True]]).expand(2, -1)
    want = stack(x[:, 3:], condition=condition, mems=first.hiddens, mem_masks=[None, seen])
    torch.testing.assert_close(stack(x[:, 3:], condition=condition, mems=shorter), want)


def test_masked_mems_are_not_there() -> None:
    stack, x = built(Decoder), drawn(2, 4, DIM)
    mems, hidden = [drawn(2, 3, DIM)] * 2, torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(stack(x, mems=mems, mem_masks=[hidden] * 2), stack(x))
    seen = hidden.clone()
    seen[:, -1] = True
    torch.testing.assert_close(stack(x, mems=mems, mem_masks=[seen, None]), stack(x, mems=[mems[0][:, -1:], mems[1]]))
    ones = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(stack(x, mems=mems, self_attn_kv_mask=ones), stack(x, mems=mems))


def test_left_padding_equals_no_padding() -> None:
    for flags in ({'rotary_pos_emb': True}, {'rel_pos_bias': True}, {'shift_tokens': 1}, {'attn_num_mem_kv': 2}):
        stack, x = built(Decoder, **flags), drawn(2, 5, DIM)
        padded = torch.cat((drawn(2, 2, DIM), x), dim=1)
        starts = torch.tensor([2, 2])
        torch.testing.assert_close(stack(padded, seq_start_pos=starts)[:, 2:], stack(x), msg=str(flags))


def test_own_mask_zeroes_rows_and_key_mask_does_not() -> None:
    stack, x = built(Encoder), drawn(2, 5, DIM)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, -2:] = False
    got = stack(x, mask=mask)
    torch.testing.assert_close(got[:, :3], stack(x[:, :3]))
    torch.testing.assert_close(stack(x, self_attn_kv_mask=mask)[:, :3], got[:, :3])
    assert not torch.allclose(stack(x, self_attn_kv_mask=mask)[:, 3:], got[:, 3:])


def test_masks_and_biases_by_pair_with_memories_in_front() -> None:
    x, mems = drawn(2, 4, DIM), [drawn(2, 3, DIM)] * 2
    for stack in (built(Encoder), built(Encoder, attn_num_mem_kv=2)):
        pairs = torch.rand(2, 1, 4, 4) > 0.3
        wide = torch.cat((torch.ones(2, 1, 4, 3, dtype=torch.bool), pairs), dim=-1)
        torch.testing.assert_close(stack(x, mems=mems, attn_mask=pairs), stack(x, mems=mems, attn_mask=wide))
        bias = drawn(2, 4, 4)
        torch.testing.assert_close(
            stack(x, mems=mems, attn_bias=bias), stack(x, mems=mems, attn_bias=torch.cat((torch.zeros(2, 4, 3), bias), dim=-1))
        )
        assert not torch.allclose(stack(x, mems=mems, attn_bias=bias), stack(x, mems=mems))


def test_positions_of_the_caller() -> None:
    x, pos = drawn(2, 5, DIM), torch.tensor([0, 2, 3, 7, 8])
    for flags in ({'rotary_pos_emb': True}, {'alibi_pos_bias': True}, {'polar_pos_emb': True}):
        stack = built(Decoder, **flags)
        assert not torch.allclose(stack(x, pos=pos), stack(x)), flags
        torch.testing.assert_close(stack(x, pos=pos + 5), stack(x, pos=pos), msg=str(flags))
        rows = torch.stack((pos, pos * 2))
        torch.testing.assert_close(stack(x, pos=rows)[1], stack(x[1:], pos=pos * 2)[0], msg=str(flags))
    both = built(Decoder, rotary_pos_emb=True, rel_pos_bias=True)
    assert bool(both(x).isfinite().all())
    rotary = built(Decoder, rotary_pos_emb=True)
    torch.testing.assert_close(rotary(x, seq_pos_offset=9), rotary(x))
    # an offset moves positions, and not what is padding
    starts = torch.tensor([0, 3])
    moved, still = (rotary(x, seq_start_pos=starts, seq_pos_offset=offset) for offset in (9, None))
    torch.testing.assert_close(moved[1, 3:], still[1, 3:])
    torch.testing.assert_close(rotary(x, rotary_pos_emb=rotary.rotary_pos_emb(pos)), rotary(x, pos=pos))


def test_positions_of_the_context() -> None:
    stack, x, context = built(Decoder, cross_attend=True, rotary_pos_emb=True), drawn(2, 5, DIM), drawn(2, 3, DIM)
    pos = torch.tensor([4, 0, 9])
    out = stack(x, context=context, context_pos=pos)
    assert not torch.allclose(out, stack(x, context=context))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(stack(x, context=context[:, order], context_pos=pos[order]), out)


def test_prefix() -> None:
    stack, x = built(PrefixDecoder, rotary_pos_emb=True), drawn(2, 6, DIM)
    causal = built(Decoder, rotary_pos_emb=True)
    causal.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack(x), causal(x))
    lengths = torch.tensor([2, 4])
    seen = torch.ones(6, 6).tril().bool()[None] | (torch.arange(6) < lengths[:, None])[:, None]
    encoder = built(Encoder, rotary_pos_emb=True)
    encoder.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack(x, prefix_attn_len=lengths), encoder(x, attn_mask=seen[:, None]))
    torch.testing.assert_close(stack(x, prefix_attn_len=4)[1], stack(x, prefix_attn_len=lengths)[1])
    hidden = torch.ones(6, 6, dtype=torch.bool)
    hidden[:, 1] = False
    torch.testing.assert_close(
        stack(x, attn_mask=hidden, prefix_attn_len=lengths), encoder(x, attn_mask=(seen & hidden)[:, None])
    )
    out, cache = stack(x[:, :4], prefix_attn_len=3, return_hiddens=True)
    rest, _ = stack(x[:, 4:], prefix_attn_len=3, cache=cache, cache_age=0, return_hiddens=True)
    torch.testing.assert_close(torch.cat((out, rest), dim=1), stack(x, prefix_attn_len=3))


# ---------------------------------------------------------------- conditions and external things


@pytest.mark.parametrize('per_token', [False, True])
def test_conditions(per_token: bool) -> None:
    stack = built(Decoder, use_adaptive_rmsnorm=True, use_adaptive_layerscale=True, dim_condition=3, num_residual_streams=2)
    x = drawn(2, 5, DIM)
    condition = drawn(2, 5, 3) if per_token else drawn(2, 3)
    out = stack(x, condition=condition)
    torch.testing.assert_close(stack(x[1:], condition=condition[1:]), out[1:])
    assert not torch.allclose(stack(x, condition=condition * 2), out)
    post = built(Encoder, use_adaptive_rmsnorm=True, dim_condition=3, num_residual_streams=2, pre_norm=False)
    torch.testing.assert_close(post(x[1:], condition=condition[1:]), post(x, condition=condition)[1:])


def test_in_attention_condition() -> None:
    stack, x, cond = built(Encoder, num_residual_streams=2), drawn(2, 5, DIM), drawn(2, DIM)
    out = stack(x, in_attn_cond=cond)
    torch.testing.assert_close(out, stack(x, in_attn_cond=cond[:, None].expand(-1, 5, -1)))
    assert not torch.allclose(out, stack(x))


def test_keys_and_values_of_another_model() -> None:
    other, stack = built(Decoder, depth=3, cross_attend=True), built(Encoder, depth=2)
    x, y = drawn(2, 5, DIM), drawn(2, 3, DIM)
    _, seen = other(y, context=drawn(2, 2, DIM), return_hiddens=True)
    pairs = [inter.cached_kv for inter in seen.attn_intermediates if inter.layer_type == 'a']
    out = stack(x, self_attn_additional_kv=seen)
    torch.testing.assert_close(out, stack(x, self_attn_additional_kv=pairs[-2:]))
    torch.testing.assert_close(out, stack(x, self_attn_additional_kv=seen.kv_cache))
    top = stack(x, self_attn_additional_kv=pairs[:1])
    hidden = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(stack(x, self_attn_additional_kv=pairs, additional_kv_mask=hidden), stack(x))
    first = stack(x, self_attn_additional_kv=pairs[:1], route_additional_kv_to_top=False)
    assert not torch.allclose(top, first)
    assert not torch.allclose(top, stack(x))
    torch.testing.assert_close(first, stack(x, self_attn_additional_kv=[*pairs[:1], None]))
    keys = [tuple(t.detach().requires_grad_() for t in pair) for pair in pairs]
    for to_top in (True, False):
        detached = stack(x, self_attn_additional_kv=keys, detach_additional_kv=True, route_additional_kv_to_top=to_top)
        detached.sum().backward()
        assert keys[-1][0].grad is None
        assert keys[0][0].grad is None
    stack(x, self_attn_additional_kv=keys).square().sum().backward()
    assert keys[-1][0].grad is not None
    assert keys[0][0].grad is None


def test_deep_embeds_by_executed_feed_forward() -> None:
    stack, x = built(Encoder, weight_tie_layers=True), drawn(2, 5, DIM)
    table, ids = torch.ones(7, 2, DIM, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    torch.testing.assert_close(stack(x, deep_embeds_and_ids=(table, ids)), stack(x))
    table[:, 1] = 0
    want = stack.layers[0].norm_before(stack.layers[0].norms[0], x, None)
    h = stack.layers[0].branch(want) + x
    h = stack.layers[1].branch(stack.layers[1].norm_before(stack.layers[1].norms[0], h, None)) + h
    h = stack.layers[0].branch(stack.layers[0].norm_before(stack.layers[0].norms[0], h, None)) + h
    torch.testing.assert_close(stack(x, deep_embeds_and_ids=(table, ids)), stack.final_norm(h))
    # a short table serves the first feed-forwards
    torch.testing.assert_close(stack(x, deep_embeds_and_ids=(table[:, :1], ids)), stack(x))


def test_residuals_of_keys_and_values() -> None:
    stack, x, context = built(Decoder, cross_attend=True), drawn(2, 5, DIM), drawn(2, 3, DIM)
    own, cross = drawn(2, 2, 5, DIM), drawn(2, 2, 3, DIM)
    first_only = stack(x, context=context, self_attn_kv_residuals=own[0], cross_attn_kv_residuals=cross[0])
    own[1], cross[1] = 0, 0
    torch.testing.assert_close(first_only, stack(x, context=context, self_attn_kv_residuals=own, cross_attn_kv_residuals=cross))
    torch.testing.assert_close(
        stack(x, context=context, cross_attn_kv_residuals=cross[0].expand(2, -1, -1, -1)), stack(x, context=context + cross[0])
    )


def test_qk_clip_of_a_layer_that_ran_twice() -> None:
    stack, x = built(Encoder, weight_tie_layers=True, shift_tokens=1, use_layerscale=True), drawn(2, 5, DIM) * 3
    _, seen = stack(x, return_hiddens=True)
    scores = [inter.pre_softmax_attn.detach() for inter in seen.attn_intermediates]
    largest = torch.stack([t.amax(dim=(0, 2, 3)) for t in scores]).amax(dim=0)
    tau = float(largest.min()) * 0.5
    attention = stack.layers[0].inside
    before = attention.to_q.weight.detach().clone(), attention.to_k.weight.detach().clone()
    stack.attn_qk_clip_(seen, tau=tau)
    product = ((attention.to_q.weight / before[0]).mean(dim=1) * (attention.to_k.weight / before[1]).mean(dim=1)).detach()
    torch.testing.assert_close(product.view(2, 6), (tau / largest)[:, None].expand(2, 6))
    with pytest.raises(ValueError, match='one for each executed layer'):
        stack.attn_qk_clip_(stack(x, layers_execute_order=(0, 1), return_hiddens=True)[1])


def test_muon_parameters() -> None:
    stack = built(Decoder, shift_tokens=1)
    assert {id(p) for p in stack.muon_parameters()} < {id(p) for p in stack.parameters()}
    assert len(stack.muon_parameters()) == 2 * (2 + 2)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    'flags',
    [
        {'num_residual_streams': 2, 'qkv_receive_diff_residuals': True, 'hyper_conn_doubly_stochastic': True},
        {'integrate_layers': True, 'unet_skips': True, 'macaron': True},
        {'gate_residual': True, 'scale_residual': True, 'shift_tokens': 1, 'sandwich_norm': True},
        {'resi_dual': True, 'use_layerscale': True, 'reinject_input': True, 'learned_reinject_input_gate': True},
    ],
)
def test_every_parameter_gets_a_gradient(flags: dict[str, Any]) -> None:
    stack = built(Decoder, **flags)
    stack(drawn(2, 5, DIM)).square().sum().backward()
    assert [name for name, parameter in stack.named_parameters() if parameter.grad is None] == []


def test_an_old_cache_stays_valid() -> None:
    stack, x = built(Decoder, rotary_pos_emb=True), drawn(1, 8, DIM)
    with torch.no_grad():
        _, seen = stack(x[:, :4], return_hiddens=True)
        assert isinstance(seen.kv_cache, KVCache)
        assert seen.kv_cache.length == 4
        once, _ = stack(x[:, 4:6], cache=seen, cache_age=0, return_hiddens=True)
        stack(x[:, 5:7], cache=seen, cache_age=0, return_hiddens=True)
        again, _ = stack(x[:, 4:6], cache=seen.kv_cache, cache_age=0, return_hiddens=True)
    assert torch.equal(once, again)
    assert seen.kv_cache.length == 4


@pytest.mark.parametrize('custom', [('a',), ('a', 'f'), ('f', 'a')])
def test_shifted_layers_are_blind_to_padding(custom: tuple[str, ...]) -> None:
    x, mask = drawn(1, 5, DIM), torch.tensor([[True] * 3 + [False] * 2])
    other = torch.cat((x[:, :3], drawn(1, 2, DIM)), dim=1)
    stack = built(Encoder, custom_layers=custom, depth=None, shift_tokens=1)
    assert torch.allclose(stack(x, mask=mask)[:, :3], stack(other, mask=mask)[:, :3])
    assert torch.allclose(stack(x, mask=mask)[:, :3], stack(x[:, :3]))


def test_scores_that_are_handed_on_hold_the_bias_already() -> None:
    stack, x = built(Encoder, residual_attn=True, rel_pos_bias=True), drawn(2, 5, DIM)
    _, seen = stack(x, return_hiddens=True)
    bias = stack.rel_pos(5, 5)
    first, second = seen.attn_intermediates
    torch.testing.assert_close(first.pre_softmax_attn, first.qk_similarities + bias)
    torch.testing.assert_close(second.pre_softmax_attn, second.qk_similarities + bias)
    own = stack.layers[2].inside
    normed = stack.layers[2].norm_before(stack.layers[2].norms[0], seen.hiddens[1], None)
    q, k = ((normed @ to.weight.t()).unflatten(-1, (2, 6)).transpose(1, 2) for to in (own.to_q, own.to_k))
    torch.testing.assert_close(second.qk_similarities, q @ k.mT * 6**-0.5 + first.qk_similarities + bias)


@pytest.mark.parametrize('flags', [{'rotary_pos_emb': True}, {'rotary_xpos': True}, {'polar_pos_emb': True}])
def test_left_padding_is_not_noticed_by_learned_keys(flags: dict[str, Any]) -> None:
    """Learned keys have no place: to them it matters from where the positions of the queries are counted."""
    stack, x = built(Decoder, attn_num_mem_kv=2, **flags), drawn(2, 5, DIM)
    padded = torch.cat((drawn(2, 3, DIM), x), dim=1)
    torch.testing.assert_close(stack(padded, seq_start_pos=torch.tensor([3, 3]))[:, 3:], stack(x))


@pytest.mark.parametrize('flags', [{'attn_num_mem_kv': 2}, {'attn_l2_distance': True}], ids=str)
def test_the_decay_of_xpos_does_not_depend_on_what_follows(flags: dict[str, Any]) -> None:
    stack, x = built(Decoder, rotary_xpos=True, **flags), drawn(2, 7, DIM)
    torch.testing.assert_close(stack(x)[:, :3], stack(x[:, :3]))


def test_the_decay_of_xpos_towards_another_sequence_does_not_depend_on_what_follows() -> None:
    x, context = drawn(2, 7, DIM), drawn(2, 4, DIM)
    places = {'context': context, 'context_pos': torch.arange(4)}
    crossing = built(Decoder, rotary_xpos=True, cross_attend=True)
    torch.testing.assert_close(crossing(x, **places)[:, :3], crossing(x[:, :3], **places))
    stack = built(Decoder, rotary_xpos=True)
    _, seen = stack(context, return_hiddens=True)
    more = {'self_attn_additional_kv': seen}
    torch.testing.assert_close(stack(x, **more)[:, :3], stack(x[:, :3], **more))


def test_scores_are_handed_on_between_layers_with_and_without_external_keys() -> None:
    """External keys go to the top layer only: the layer below hands on fewer columns, and own keys stay in line."""
    stack, x = built(Decoder, depth=2, residual_attn=True), drawn(2, 5, DIM)
    heads, width = stack.attn_heads, stack.attn_dim_head
    extra = [(drawn(2, heads, 3, width), drawn(2, heads, 3, width))]
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(stack(x, self_attn_additional_kv=extra, additional_kv_mask=nobody), stack(x))
    assert not torch.allclose(stack(x, self_attn_additional_kv=extra), stack(x))
