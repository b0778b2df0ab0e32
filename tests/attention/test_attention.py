from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.inputs import Intermediates
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError, UnknownFlag

B, N, D, H, W = 2, 6, 12, 4, 6


def angles(length: int, width: int = 4) -> torch.Tensor:
    rates = 10000 ** -(torch.arange(0, width, 2) / width)
    return (torch.arange(length)[:, None] * rates).repeat_interleave(2, dim=-1)[None]


def small(**flags):
    torch.manual_seed(0)
    return Attention(D, **{'heads': H, 'dim_head': W, **flags})


def by_hand(attn, x, source, allowed):
    """One query and one head at a time; ``allowed(b, i, j)``."""
    q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
    out = torch.zeros(*x.shape[:2], attn.heads * attn.value_dim_head)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for h in range(attn.heads):
                g, w, e = h % attn.kv_heads, attn.dim_head, attn.value_dim_head
                js = [j for j in range(source.shape[1]) if allowed(b, i, j)]
                if not js:
                    continue
                scores = torch.stack([q[b, i, h * w : h * w + w] @ k[b, j, g * w : g * w + w] for j in js]) * w**-0.5
                values = torch.stack([v[b, j, g * e : g * e + e] for j in js])
                out[b, i, h * e : h * e + e] = scores.softmax(0) @ values
    return attn.to_out(out)


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize(
    'flags', [{}, {'kv_heads': 2}, {'one_kv_head': True}, {'value_dim_head': 3, 'kv_heads': 2, 'dim_out': 5}]
)
@pytest.mark.parametrize('causal', [False, True])
def test_plain_attention(flags, causal):
    attn, x = small(causal=causal, **flags), torch.randn(B, N, D)
    torch.testing.assert_close(attn(x), by_hand(attn, x, x, lambda b, i, j: not causal or j <= i))


def test_padding_is_not_seen_and_gives_zero():
    attn, x = small(causal=True), torch.randn(B, N, D)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 4:] = mask[1, :2] = False
    out = attn(x, mask=mask)
    expected = by_hand(attn, x, x, lambda b, i, j: j <= i and bool(mask[b, j]))
    torch.testing.assert_close(out, expected * mask[..., None])
    moved = torch.where(mask[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(attn(moved, mask=mask), out)


def test_context_mask_replaces_mask_for_the_keys():
    attn, x = small(), torch.randn(B, N, D)
    rows, keys = torch.rand(B, N) > 0.3, torch.rand(B, N) > 0.3
    keys[:, 0] = True
    expected = by_hand(attn, x, x, lambda b, i, j: bool(keys[b, j])) * rows[..., None]
    torch.testing.assert_close(attn(x, mask=rows, context_mask=keys), expected)


def test_cross_attention():
    attn = small(dim_context=5)
    x, context = torch.randn(B, N, D), torch.randn(B, 3, 5)
    seen = torch.tensor([[True, False, True], [False, True, True]])
    torch.testing.assert_close(
        attn(x, context=context, context_mask=seen), by_hand(attn, x, context, lambda b, i, j: bool(seen[b, j]))
    )


@pytest.mark.parametrize('mem_mask', [False, True])
@pytest.mark.parametrize('kind', ['none', 'mask', 'context_mask', 'long'])
def test_memories_lie_in_front(mem_mask, kind):
    attn = small(causal=True, max_attend_past=4)
    x, mem = torch.randn(B, N, D), torch.randn(B, 3, D)
    mems = torch.tensor([[True, False, True], [True, True, True]]) if mem_mask else torch.ones(B, 3, dtype=torch.bool)
    own = torch.ones(B, N, dtype=torch.bool)
    if kind != 'none':
        own[0, 5] = own[1, 1] = False
    keys = torch.cat((mems, own), 1)
    given = {'none': {}, 'mask': {'mask': own}, 'context_mask': {'context_mask': own}, 'long': {'context_mask': keys}}[kind]
    out = attn(x, mem=mem, mem_mask=mems if mem_mask else None, **given)
    expected = by_hand(attn, x, torch.cat((mem, x), 1), lambda b, i, j: i - 1 <= j <= i + 3 and bool(keys[b, j]))
    torch.testing.assert_close(out, expected * own[..., None] if kind == 'mask' else expected)


@pytest.mark.parametrize('past', [None, 1])
def test_a_window_on_both_sides(past):
    attn, x = small(max_attend_past=past, max_attend_future=2), torch.randn(B, N, D)
    back = N if past is None else past
    torch.testing.assert_close(attn(x), by_hand(attn, x, x, lambda b, i, j: i - back <= j <= i + 2))
    assert small().max_attend_future is None


def test_shift_of_keys_and_values():
    attn, x, shift = small(), torch.randn(B, N, D), torch.randn(B, N, D)
    torch.testing.assert_close(attn(x, kv_input_residual=shift), by_hand(attn, x, x + shift, lambda b, i, j: True))


def test_pair_masks_by_head_and_by_row():
    attn, x = small(), torch.randn(B, N, D)
    pairs = torch.rand(N, N) > 0.4
    whole = attn(x, attn_mask=pairs)
    torch.testing.assert_close(whole, by_hand(attn, x, x, lambda b, i, j: bool(pairs[i, j])))
    torch.testing.assert_close(attn(x, attn_mask=pairs.expand(H, N, N)), whole)
    torch.testing.assert_close(attn(x, attn_mask=pairs.expand(B, 1, N, N)), whole)


def test_previous_scores_are_added():
    attn, x, before = small(), torch.randn(B, N, D), torch.randn(B, H, N, N)
    _, plain = attn(x, return_intermediates=True)
    _, inter = attn(x, prev_attn=before, return_intermediates=True)
    torch.testing.assert_close(inter.qk_similarities, plain.qk_similarities + before)
    torch.testing.assert_close(inter.post_softmax_attn, (plain.qk_similarities + before).softmax(-1))


def test_intermediates_are_complete():
    attn, x = small(causal=True, kv_heads=2), torch.randn(B, N, D)
    out, inter = attn(x, return_intermediates=True)
    torch.testing.assert_close(out, attn(x))
    assert [t.shape for t in inter.to_tuple()] == [(B, H, N, N)] * 3
    assert inter.values.shape == (B, 2, N, W)
    assert inter.layer_type is None
    torch.testing.assert_close(inter.cached_kv[0], attn.to_k(x).unflatten(-1, (2, W)).transpose(1, 2))
    torch.testing.assert_close(inter.cached_kv[1], inter.values)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    'flags',
    [
        {},
        {'kv_heads': 2, 'value_dim_head': 3},
        {'one_kv_head': True},
        {'num_mem_kv': 2},
        {'add_zero_kv': True},
        {'qk_norm': True, 'qk_norm_groups': 2, 'qk_norm_dim_scale': True},
        {'value_rmsnorm': True, 'laser': True},
        {'head_scale': True, 'gate_value_heads': True, 'gate_values': True, 'on_attn': True},
        {'rotate_num_heads': 2},
        {'rotate_num_heads': 0, 'kv_heads': 2},
        {'max_attend_past': 2},
        {'orthog_projected_values': True, 'orthog_projected_values_per_head': True},
        {'head_learned_sink': True, 'softclamp_logits': True},
        {'use_cope': True, 'cope_max_pos': 4},
        {'data_dependent_alibi': True},
        {'data_dependent_alibi': True, 'data_dependent_alibi_per_row': True},
    ],
    ids=lambda flags: '+'.join(flags) or 'plain',
)
@pytest.mark.parametrize('rotary', [False, True])
@pytest.mark.parametrize('mems', [0, 2])
def test_cached_equals_full(flags, rotary, mems):
    attn = small(causal=True, **flags)
    x, mem = torch.randn(B, N, D), torch.randn(B, mems, D) if mems else None

    def place(end):
        return {'rotary_pos_emb': (angles(mems + end), 1.0)} if rotary else {}

    full = attn(x, mem=mem, **place(N))
    for grad in (False, True):
        cache, outs = None, []
        with torch.set_grad_enabled(grad):
            for start, end in ((0, 3), (3, 4), (4, N)):
                out, cache = attn(x[:, start:end], mem=mem, cache=cache, return_intermediates=True, **place(end))
                outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), full, atol=2e-5, rtol=1e-4)


def test_value_residual_while_decoding():
    attn, x = small(causal=True, learned_value_residual_mix=True, kv_heads=2), torch.randn(B, N, D)
    first = torch.randn(B, 2, N, W)
    full = attn(x, value_residual=first)
    _, cache = attn(x[:, :4], value_residual=first[:, :, :4], return_intermediates=True)
    torch.testing.assert_close(attn(x[:, 4:], value_residual=first[:, :, 4:], cache=cache), full[:, 4:])


def test_a_past_can_be_continued_twice():
    attn, x = small(causal=True), torch.randn(B, N, D)
    with torch.no_grad():
        _, cache = attn(x[:, :4], return_intermediates=True)
        once = attn(x[:, 4:5], cache=cache)
        attn(torch.randn(B, 2, D), cache=cache)
        assert cache.cached_kv[0].shape[-2] == 4
        torch.testing.assert_close(attn(x[:, 4:5], cache=cache), once, rtol=0, atol=0)


def test_masks_cover_past_and_new_keys_while_decoding():
    attn, x = small(causal=True), torch.randn(B, N, D)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :2] = False
    full = attn(x, mask=mask)
    _, cache = attn(x[:, :4], mask=mask[:, :4], return_intermediates=True)
    torch.testing.assert_close(attn(x[:, 4:], mask=mask, cache=cache), full[:, 4:])
    with pytest.raises(ValueError, match='past and new'):
        attn(x[:, 4:], mask=mask[:, 4:], cache=cache)


def test_selective_attention_does_not_continue():
    attn, x = small(causal=True, selective=True), torch.randn(B, N, D)
    assert not attn.can_cache_kv
    assert small().can_cache_kv
    _, cache = attn(x, return_intermediates=True)
    with pytest.raises(ValueError, match='selective'):
        attn(x[:, :1], cache=cache)


# ---------------------------------------------------------------- checkpoints, start, dtypes

BASE = {'to_q.weight': (24, 12), 'to_k.weight': (24, 12), 'to_v.weight': (24, 12), 'to_out.weight': (12, 24)}
KEYS = [
    ({}, {}),
    ({'kv_heads': 2}, {'to_k.weight': (12, 12), 'to_v.weight': (12, 12)}),
    ({'dim_context': 5, 'dim_out': 7}, {'to_k.weight': (24, 5), 'to_v.weight': (24, 5), 'to_out.weight': (7, 24)}),
    ({'value_dim_head': 3}, {'to_v.weight': (12, 12), 'to_out.weight': (12, 12)}),
    ({'on_attn': True}, {'to_out.weight': None, 'to_out.0.weight': (24, 24)}),
    ({'use_latent_q': True, 'dim_latent_q': 5}, {'to_latent_q.weight': (5, 12), 'to_q.weight': (24, 5)}),
    (
        {'use_latent_kv': True, 'dim_latent_kv': 5, 'latent_rope_subheads': 1},
        {
            'to_latent_kv.weight': (5, 12),
            'to_rotateable_k.weight': (6, 12),
            'to_k.weight': (18, 5),
            'to_v.weight': (24, 5),
        },
    ),
    ({'gate_values': True}, {'to_v_gate.weight': (24, 12), 'to_v_gate.bias': (24,)}),
    ({'gate_value_heads': True}, {'to_v_head_gate.weight': (4, 12), 'to_v_head_gate.bias': (4,)}),
    ({'qk_norm': True, 'qk_norm_dim_scale': True}, {'qk_norm_q_scale': (4, 1, 6), 'qk_norm_k_scale': (4, 1, 6)}),
    ({'value_rmsnorm': True}, {'value_rmsnorm.gamma': (4, 1, 6)}),
    ({'num_mem_kv': 3}, {'mem_k': (4, 3, 6), 'mem_v': (4, 3, 6)}),
    ({'head_scale': True}, {'head_scale_params': (1, 4, 1, 1)}),
    (
        {'learned_value_residual_mix': True},
        {'to_value_residual_mix.0.weight': (4, 12), 'to_value_residual_mix.0.bias': (4,)},
    ),
    ({'orthog_projected_values': True}, {}),
    ({'orthog_projected_values': True, 'orthog_projected_values_per_head': True}, {'to_out.weight': (12, 48)}),
    (
        {'data_dependent_alibi': True, 'causal': True},
        {'data_dependent_alibi.to_forget_gates.0.weight': (4, 12), 'data_dependent_alibi.to_forget_gates.0.bias': (4,)},
    ),
    (
        {'data_dependent_alibi': True, 'data_dependent_alibi_per_row': True, 'causal': True},
        {'data_dependent_alibi.to_forget_gates.0.weight': (64, 12)},
    ),
    ({'pre_talking_heads': True}, {'attend.pre_softmax_talking_heads.weight': (4, 4, 1, 1)}),
    ({'post_talking_heads': True}, {'attend.post_softmax_talking_heads.weight': (4, 4, 1, 1)}),
    ({'pre_scale_post_talking_heads': True}, {'attend.pre_scale_post_talking_heads.weight': (4, 4, 1, 1)}),
    ({'head_learned_sink': True}, {'attend.head_attn_sink': (4,)}),
    (
        {'use_cope': True, 'causal': True, 'cope_talking_heads': True},
        {'attend.cope.pos_emb': (16, 6), 'attend.cope.talking_heads.weight': (4, 4, 1, 1)},
    ),
    (
        {'hybrid_module': nn.Linear(12, 24, bias=False), 'hybrid_fold_axial_dim': 1, 'hybrid_learned_mix': True},
        {
            'hybrid_module.fn.weight': (24, 12),
            'hybrid_norms.0.gamma': (4, 1, 6),
            'hybrid_norms.1.gamma': (4, 1, 6),
            'hybrid_mix.weight': (4, 12),
        },
    ),
]


@pytest.mark.parametrize(('flags', 'keys'), KEYS, ids=['+'.join(flags) or 'plain' for flags, _ in KEYS])
def test_names_and_shapes_in_checkpoints(flags, keys):
    attn = small(**flags)
    expected = {name: shape for name, shape in {**BASE, **keys}.items() if shape is not None}
    assert {name: tuple(t.shape) for name, t in attn.state_dict().items()} == expected
    # every parameter learns, and the meta device gives the same shapes
    for p in attn.parameters():
        nn.init.normal_(p, std=0.5)
    context = torch.randn(B, 3, 5) if 'dim_context' in flags else None
    first = torch.randn(B, H, N, W) if 'learned_value_residual_mix' in flags else None
    attn(torch.randn(B, N, D), context=context, value_residual=first).square().sum().backward()
    assert [name for name, p in attn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(('flags', 'keys'), KEYS, ids=['+'.join(flags) or 'plain' for flags, _ in KEYS])
def test_built_on_the_meta_device_and_filled(flags, keys):
    if 'hybrid_module' in flags:
        flags = {**flags, 'hybrid_module': nn.Linear(12, 24, bias=False)}
    with torch.device('meta'):
        attn = Attention(D, heads=H, dim_head=W, **flags)
    attn = attn.to_empty(device='cpu')
    for t in attn.state_dict().values():
        t.fill_(float('nan'))
    attn.reset_parameters()
    made = small(**flags)
    for name, t in attn.state_dict().items():
        assert torch.isfinite(t).all(), name
        other = made.state_dict()[name]
        if not other.std() > 0:
            assert torch.equal(t, other), name


def test_flags_that_are_parsed_already():
    flags = AttentionFlags.parse({'heads': H, 'dim_head': W}, where='test')
    attn = Attention.from_flags(D, flags)
    assert attn.flags is flags
    attn.load_state_dict(small().state_dict())
    x = torch.randn(B, N, D)
    torch.testing.assert_close(attn(x), small()(x))
    with pytest.raises(FlagError):
        Attention(D, heads=4, kv_heads=3)
    with pytest.raises(UnknownFlag, match='dim_head'):
        Attention(D, dim_heads=4)


def test_double_autocast_and_copies():
    flags = {'causal': True, 'num_mem_kv': 2, 'qk_norm': True, 'qk_norm_dim_scale': True, 'head_scale': True}
    attn, x = small(**flags), torch.randn(B, N, D)
    plain = attn(x)
    exact = deepcopy(attn).double()(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), plain)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rough = attn(x)
    assert torch.isfinite(rough).all()
    torch.testing.assert_close(rough.float(), plain, atol=0.1, rtol=0.1)


def test_dropout_of_the_output():
    attn, x = small(sublayer_dropout=0.5), torch.randn(B, N, D)
    assert (attn(x) == 0).any()
    assert not (attn.eval()(x) == 0).any()


def test_compiles_without_a_graph_break():
    attn, x = small(causal=True, kv_heads=2, num_mem_kv=2, qk_norm=True, gate_values=True), torch.randn(B, N, D)
    place, mask = (angles(N), 1.0), torch.ones(B, N, dtype=torch.bool)
    torch._dynamo.reset()
    compiled = torch.compile(attn, fullgraph=True, backend='eager')
    out, inter = compiled(x, mask=mask, rotary_pos_emb=place, return_intermediates=True)
    torch.testing.assert_close(out, attn(x, mask=mask, rotary_pos_emb=place))
    torch.testing.assert_close(inter.values, attn.to_v(x).unflatten(-1, (2, W)).transpose(1, 2))


# ---------------------------------------------------------------- training tools


def test_muon_parameters():
    attn = small(on_attn=True)
    assert [id(p) for p in attn.muon_parameters()] == [id(attn.to_v.weight), id(attn.to_out[0].weight)]


@pytest.mark.parametrize(
    'flags',
    [
        {},
        {'kv_heads': 2, 'num_mem_kv': 2},
        {'one_kv_head': True},
        {'use_latent_q': True, 'dim_latent_q': 5, 'use_latent_kv': True, 'dim_latent_kv': 7, 'latent_rope_subheads': 2},
    ],
)
def test_clipped_heads_reach_tau_and_others_stay(flags):
    attn, x = small(**flags), 10 * torch.randn(B, N, D)
    with torch.no_grad():
        attn.to_q.weight[:W].mul_(20)
        attn.to_q.weight[W : 2 * W].mul_(0.01)
    weights = [attn.to_q.weight.clone(), attn.to_k.weight.clone()]
    _, before = attn(x, return_intermediates=True)
    before.pre_softmax_attn = before.pre_softmax_attn.detach()
    largest = before.pre_softmax_attn.amax((0, 2, 3))
    tau = 0.5 * float(largest.max())
    attn.qk_clip_(before, tau=tau)
    _, after = attn(x, return_intermediates=True)
    factors = (tau / largest).clamp(max=1)
    assert (factors < 1).any()
    assert (factors == 1).any()
    torch.testing.assert_close(after.pre_softmax_attn, before.pre_softmax_attn * factors[:, None, None], atol=1e-3, rtol=1e-4)
    assert (attn.to_q.weight.abs() <= weights[0].abs() + 1e-6).all()
    assert (attn.to_k.weight.abs() <= weights[1].abs() + 1e-6).all()


def test_negative_scores_are_not_clipped():
    attn = small()
    before = deepcopy(attn.state_dict())
    attn.qk_clip_(torch.full((B, H, N, N), -1000.0), tau=1.0)
    assert all(torch.equal(t, before[name]) for name, t in attn.state_dict().items())
    with pytest.raises(ValueError, match='one map for each head'):
        attn.qk_clip_(torch.zeros(B, 3, N, N))
    with pytest.raises(ValueError, match='must hold pre_softmax_attn'):
        attn.qk_clip_(Intermediates())


# ---------------------------------------------------------------- bad arguments

X = torch.zeros(B, N, D)
YES = torch.ones(B, N, dtype=torch.bool)
BAD = [
    ({}, {'x': X[..., :5]}, ValueError, 'x must have shape'),
    ({}, {'x': X.long()}, TypeError, 'floating point'),
    ({'qkv_receive_diff_residuals': True}, {}, ValueError, 'views for queries'),
    ({}, {'mask': YES.float()}, TypeError, 'mask must be a boolean'),
    ({}, {'mask': YES[:, :3]}, ValueError, 'mask must have shape'),
    ({}, {'mask': YES[:1]}, ValueError, 'mask must have shape'),
    ({}, {'context_mask': YES[:, 1:]}, ValueError, 'context_mask must have shape'),
    ({'dim_context': 5}, {}, ValueError, 'context must be given'),
    ({'dim_context': 5}, {'context': X}, ValueError, 'context must have shape'),
    ({}, {'attn_mask': torch.ones(N, N)}, TypeError, 'attn_mask must be a boolean'),
    ({}, {'attn_mask': torch.ones(3, N, N, dtype=torch.bool)}, ValueError, r'attn_mask must be \(i j\)'),
    ({}, {'attn_bias': torch.ones(N, N + 1)}, ValueError, 'attn_bias must be'),
    ({}, {'attn_bias': torch.ones(N, N), 'rel_pos': nn.Identity()}, ValueError, 'must not both be given'),
    ({}, {'mem_mask': YES}, ValueError, 'mem must be given'),
    ({}, {'mem': X[..., :5]}, ValueError, 'mem must have shape'),
    ({}, {'mem': X[:, :2], 'mem_mask': YES}, ValueError, 'mem_mask must have shape'),
    ({}, {'rotary_pos_emb': (angles(N), 1.0), 'context': X}, ValueError, 'context_rotary_pos_emb must be given'),
    ({}, {'context_rotary_pos_emb': (angles(N), 1.0)}, ValueError, 'context and rotary_pos_emb must be given'),
    ({}, {'prev_attn': torch.zeros(B, 3, N, N)}, ValueError, 'prev_attn must have shape'),
    ({}, {'value_residual': torch.zeros(B, H, 3, W)}, ValueError, 'value_residual must have shape'),
    ({}, {'kv_input_residual': X[:, 1:]}, ValueError, 'kv_input_residual must have shape'),
    ({}, {'additional_key_value_mask': YES}, ValueError, 'additional_key_values must be given'),
    ({}, {'cache': 3}, TypeError, 'cache must be'),
    ({}, {'flash_pack_seq_kwargs': {}}, ValueError, 'flash_pack_seq=True'),
    ({'data_dependent_alibi': True}, {'context': X}, ValueError, 'context must be None with data_dependent_alibi'),
]


@pytest.mark.parametrize(('flags', 'given', 'error', 'says'), BAD, ids=[says for *_, says in BAD])
def test_bad_arguments_are_named(flags, given, error, says):
    given = dict(given)
    with pytest.raises(error, match=says):
        small(**flags)(given.pop('x', X), **given)
