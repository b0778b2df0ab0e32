"""With a cache, in any steps, a stack gives what it gives for the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.layers.test_stack import DIM, built, drawn
from x_transformers.layers.stack import Decoder

NEW: dict[str, Any] = {'input_not_include_cache': True}
FLAGS: dict[str, dict[str, Any]] = {
    'plain': {},
    'rotary': {'rotary_pos_emb': True},
    'xpos': {'rotary_xpos': True},
    'polar': {'polar_pos_emb': True},
    'alibi': {'alibi_pos_bias': True},
    't5': {'rel_pos_bias': True},
    'dynamic': {'dynamic_pos_bias': True},
    'shift': {'shift_tokens': 2, 'rotary_pos_emb': True},
    'shift_views': {'shift_tokens': 1, 'integrate_layers': True},
    'streams': {'num_residual_streams': 2, 'qkv_receive_diff_residuals': True},
    'lime': {'integrate_layers': True, 'reinject_input': True, 'learned_reinject_input_gate': True},
    'unet': {'unet_skips': True, 'macaron': True},
    'resi_dual': {'resi_dual': True},
    'gate': {'gate_residual': True, 'sandwich_norm': True},
    'value_residual': {'add_value_residual': True, 'attn_kv_heads': 1},
    'residual_attn': {'residual_attn': True},
    'tied': {'weight_tie_layers': True, 'shift_tokens': 1},
    'window': {'attn_max_attend_past': 2},
    'memory': {'attn_num_mem_kv': 2, 'attn_add_zero_kv': True, 'attn_head_learned_sink': True},
    'custom': {'depth': None, 'custom_layers': ('f', 'a', 'a', 'f'), 'rotary_pos_emb': True},
}


@pytest.mark.parametrize('name', FLAGS)
@pytest.mark.parametrize('cuts', [[3, 1, 1, 2], [1, 4, 2]])
@torch.no_grad()
def test_new_tokens_only(name: str, cuts: list[int]) -> None:
    stack, x = built(Decoder, **FLAGS[name]), drawn(2, 7, DIM)
    whole, cache, outs = stack(x), None, []
    for piece in x.split(cuts, dim=1):
        out, cache = stack(piece, cache=cache, input_not_include_cache=True, return_hiddens=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    assert cache.cache_length == 7


@pytest.mark.parametrize('name', ['plain', 'rotary', 'xpos', 'shift', 'lime', 'value_residual'])
@torch.no_grad()
def test_the_whole_sequence_again(name: str) -> None:
    stack, x = built(Decoder, **FLAGS[name]), drawn(2, 7, DIM)
    whole = stack(x)
    _, cache = stack(x[:, :3], return_hiddens=True)
    torch.testing.assert_close(stack(x, cache=cache), whole[:, 3:])
    torch.testing.assert_close(stack(x[:, 3:], cache=cache, cache_age=0), whole[:, 3:])
    torch.testing.assert_close(stack(x[:, :5], cache=cache, cache_age=2), whole[:, 3:5])
    # the end of what has been read, as callers of the original give it: its last token is new
    torch.testing.assert_close(stack(x[:, 2:4], cache=cache), whole[:, 3:4])
    torch.testing.assert_close(stack(x[:, 3:6], cache=cache, **NEW), whole[:, 3:6])


@pytest.mark.parametrize('name', ['rotary', 'xpos', 'alibi', 'shift', 'streams'])
@torch.no_grad()
def test_rollback_and_reorder(name: str) -> None:
    stack, x = built(Decoder, **FLAGS[name]), drawn(3, 7, DIM)
    _, seen = stack(x[:, :5], return_hiddens=True)
    back = seen.kv_cache.rollback(2)
    torch.testing.assert_close(stack(x[:, 2:4], cache=back, **NEW), stack(x)[:, 2:4])
    rows = torch.tensor([2, 0, 0])
    torch.testing.assert_close(stack(x[rows, 5:], cache=seen.kv_cache.reorder(rows), **NEW), stack(x[rows])[:, 5:])


@pytest.mark.parametrize('name', ['plain', 'rotary', 'alibi', 'shift', 'memory'])
@torch.no_grad()
def test_padding_on_the_left(name: str) -> None:
    stack, x = built(Decoder, **FLAGS[name]), drawn(2, 7, DIM)
    starts = torch.tensor([0, 2])
    whole, cache = stack(x, seq_start_pos=starts), None
    for piece in x.split([4, 1, 2], dim=1):
        at = 0 if cache is None else cache.cache_length
        out, cache = stack(piece, cache=cache, **NEW, seq_start_pos=starts, return_hiddens=True)
        torch.testing.assert_close(out, whole[:, at : at + piece.shape[1]])
    torch.testing.assert_close(whole[1:, 2:], stack(x[1:, 2:]))


@torch.no_grad()
def test_a_mask_may_cover_the_new_tokens_or_all() -> None:
    stack, x = built(Decoder, rotary_pos_emb=True), drawn(2, 8, DIM)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 1], mask[1, 5] = False, False
    whole = stack(x, mask=mask)
    _, first = stack(x[:, :4], mask=mask[:, :4], return_hiddens=True)
    out, narrow = stack(x[:, 4:7], mask=mask[:, 4:7], cache=first, **NEW, return_hiddens=True)
    # a masked token's own row is not zeroed while decoding
    torch.testing.assert_close(out[0], whole[0, 4:7])
    torch.testing.assert_close(out[1, ::2], whole[1, 4:7:2])
    also, wide = stack(x[:, 4:7], mask=mask[:, :7], cache=first, **NEW, return_hiddens=True)
    assert torch.equal(also, out)
    for cache in (narrow, wide):
        torch.testing.assert_close(stack(x[:, 7:], mask=mask[:, 7:], cache=cache, **NEW), whole[:, 7:])
        # without a mask the new tokens are tokens, and what was masked stays masked
        torch.testing.assert_close(stack(x[:, 7:], cache=cache, **NEW), whole[:, 7:])
    torch.testing.assert_close(stack(x[:, 4:5], cache=wide.kv_cache.rollback(4)), whole[:, 4:5])


@torch.no_grad()
def test_positions_of_the_caller_step_by_step() -> None:
    x, pos = drawn(2, 6, DIM), torch.tensor([[0, 2, 3, 7, 8, 20], [1, 2, 3, 4, 5, 6]])
    for flags in (FLAGS['rotary'], FLAGS['alibi'], FLAGS['polar'], {**FLAGS['alibi'], **FLAGS['rotary']}):
        stack = built(Decoder, **flags)
        whole = stack(x, pos=pos)
        _, cache = stack(x[:, :3], pos=pos[:, :3], return_hiddens=True)
        out, cache = stack(x[:, 3:5], pos=pos[:, 3:5], cache=cache, **NEW, return_hiddens=True)
        torch.testing.assert_close(out, whole[:, 3:5], msg=str(flags))
        torch.testing.assert_close(stack(x[:, 5:], pos=pos, cache=cache, **NEW), whole[:, 5:], msg=str(flags))


@torch.no_grad()
def test_mems_stay_in_front_of_the_cache() -> None:
    for flags in (FLAGS['plain'], FLAGS['rotary'], FLAGS['t5'], FLAGS['polar'], FLAGS['value_residual']):
        stack, x = built(Decoder, **flags), drawn(2, 6, DIM)
        mems = [drawn(2, 3, DIM), drawn(2, 3, DIM)]
        whole = stack(x, mems=mems)
        _, cache = stack(x[:, :2], mems=mems, return_hiddens=True)
        out, cache = stack(x[:, 2:5], mems=mems, cache=cache, input_not_include_cache=True, return_hiddens=True)
        torch.testing.assert_close(out, whole[:, 2:5], msg=str(flags))
        torch.testing.assert_close(stack(x[:, 5:], mems=mems, cache=cache, **NEW), whole[:, 5:], msg=str(flags))


@torch.no_grad()
def test_a_context_is_read_once() -> None:
    stack, x, context = built(Decoder, cross_attend=True, cross_residual_attn=True), drawn(2, 6, DIM), drawn(2, 3, DIM)
    seen = torch.tensor([[True, True, False]] * 2)
    whole = stack(x, context=context, context_mask=seen)
    _, cache = stack(x[:, :4], context=context, context_mask=seen, return_hiddens=True)
    calls = []
    for layer in stack.layers:
        if layer.inside.__class__.__name__ == 'Attention':
            layer.inside.to_k.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(stack(x[:, 4:], context=context, context_mask=seen, cache=cache, **NEW), whole[:, 4:])
    # self attention only
    assert len(calls) == 2


@torch.no_grad()
def test_a_window_of_the_past() -> None:
    stack, x = built(Decoder, rotary_pos_emb=True, attn_max_attend_past=2, depth=1), drawn(2, 9, DIM)
    whole = stack(x)
    _, seen = stack(x[:, :6], return_hiddens=True)
    cache = seen.kv_cache.window(3)
    assert (cache.length, cache.retained) == (6, 3)
    torch.testing.assert_close(stack(x[:, 6:8], cache=cache, **NEW), whole[:, 6:8])


@torch.no_grad()
def test_conditions_and_pair_masks_step_by_step() -> None:
    stack, x = built(Decoder, use_adaptive_rmsnorm=True), drawn(2, 6, DIM)
    condition, pairs = drawn(2, 6, DIM), torch.rand(6, 6) > 0.3
    pairs.fill_diagonal_(True)
    whole = stack(x, condition=condition, attn_mask=pairs)
    _, cache = stack(x[:, :3], condition=condition[:, :3], attn_mask=pairs[:3, :3], return_hiddens=True)
    for mask in (pairs, pairs[3:]):
        torch.testing.assert_close(
            stack(x[:, 3:], condition=condition[:, 3:], attn_mask=mask, cache=cache, cache_age=0), whole[:, 3:]
        )


def test_where_rows_begin_is_remembered_when_their_padding_is_out_of_sight() -> None:
    """Keys were turned by places that are counted from there, and learned keys stand still."""
    stack, x, starts = built(Decoder, rotary_pos_emb=True, attn_num_mem_kv=2), drawn(2, 7, DIM), torch.tensor([0, 3])
    _, before = stack(x[:, :6], seq_start_pos=starts, return_hiddens=True)
    given = {'cache': before.kv_cache.window(3), 'input_not_include_cache': True}
    torch.testing.assert_close(stack(x[:, 6:], **given), stack(x[:, 6:], seq_start_pos=starts, **given))
