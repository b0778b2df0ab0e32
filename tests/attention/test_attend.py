from __future__ import annotations

import copy
import inspect

import pytest
import torch

import x_transformers.attend as table
from x_transformers.attend import Attend, compact, once, pack_one, unpack_one
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.scores.contextual import CoPE
from x_transformers.flags.base import FlagError
from x_transformers.flags.scores import ScoreFlags

from .formula import FixedBias, attention

ORDER = [
    'similarity', 'residual_attn', 'record', 'pre_scale_post_talking_heads', 'pre_talking_heads', 'attn_bias',
    'softclamp_logits', 'cog_signed', 'mask', 'use_cope', 'selective', 'head_learned_sink', 'record', 'softmax', 'cog_signed',
    'attn_delta', 'record', 'head_learned_sink', 'dropout', 'post_talking_heads', 'pre_scale_post_talking_heads', 'values',
    'empty rows',
]  # fmt: skip


def test_the_order_of_rules():
    on = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads', 'cog_signed', 'head_learned_sink')
    cope = CoPE(8, 2, 4)
    attend = Attend(
        heads=2, causal=True, selective=True, softclamp_logits=True, dropout=0.1, cope=cope, **dict.fromkeys(on, True)
    )
    assert [rule.name for rule in attend.rules()] == ORDER
    assert [rule.name for rule in Attend().rules()] == [
        'similarity', 'residual_attn', 'record', 'attn_bias', 'mask', 'record', 'softmax', 'attn_delta', 'record', 'values',
        'empty rows',
    ]  # fmt: skip


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize(('queries', 'keys'), [(4, 4), (1, 4), (2, 4)])
@pytest.mark.parametrize('zero', [False, True])
def test_forward(kv_heads, queries, keys, zero):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, kv_heads, keys, 8), torch.randn(2, kv_heads, keys, 6)
    bias, seen = torch.randn(4, queries, keys), torch.rand(2, keys) > 0.3
    attend = Attend(causal=True, add_zero_kv=zero)
    pad = (0, 0, int(zero), 0)
    padded = [torch.nn.functional.pad(t, pad) for t in (k, v)]
    geometry = ScoreShape(queries, keys + zero, int(zero))
    want = attention(q, *padded, geometry, scale=8**-0.5, bias=FixedBias(bias[None]), causal=True, keys=seen)
    out, maps = attend(q, k, v, mask=seen, attn_bias=bias)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    assert maps.post_softmax_attn.shape == (2, 4, queries, keys + zero)
    dense, _ = attend(q, k, v, mask=seen[:, None, None, :], attn_bias=bias)
    torch.testing.assert_close(dense, out)
    if kv_heads == 1:
        torch.testing.assert_close(attend(q, k[:, 0], v[:, 0], mask=seen, attn_bias=bias)[0], out)


def test_query_head_h_looks_at_key_head_h_mod_kv_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    out, _ = Attend(causal=True)(q, k, v)
    for h in range(4):
        alone, _ = Attend(causal=True)(q[:, h : h + 1], k[:, h % 2 : h % 2 + 1], v[:, h % 2 : h % 2 + 1])
        torch.testing.assert_close(out[:, h : h + 1], alone)


ONE_OF = (*ScoreFlags.one_of('weights'), 'l2_distance')


@pytest.mark.parametrize('one', ONE_OF)
@pytest.mark.parametrize('other', ONE_OF)
def test_ways_to_compare_exclude_each_other(one, other):
    if one == other:
        return
    with pytest.raises(FlagError, match='only one of them can be had'):
        Attend(**{one: 2 if one == 'sparse_topk' else True, other: 2 if other == 'sparse_topk' else True})


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        ({'selective': True}, '`selective=True` with `causal=False`'),
        ({'flash': True, 'hard': True}, '`flash=True` is not available: `hard` needs the score matrix'),
        ({'flash': True, 'gumbel_softmax': True}, '`gumbel_softmax` needs the score matrix'),
        ({'flash': True, 'custom_attn_fn': torch.relu}, '`custom_attn_fn` needs the score matrix'),
        (
            {'flash': True, 'post_talking_heads': True, 'heads': 2, 'dropout': 0.1},
            '`post_talking_heads` together with `dropout`',
        ),
        ({'logit_softclamp_value': 0.0}, 'must be greater than 0'),
        ({'head_learned_sink': True}, 'Give `heads`, too'),
        ({'sparse_topk': 0}, 'must be at least 1'),
        ({'dropout': 1.5}, 'must be at most 1'),
        ({'sdp_kwargs': {'enable_flsh': True}}, 'got enable_flsh'),
        ({'sdp_kwargs': dict.fromkeys(('enable_flash', 'enable_math', 'enable_mem_efficient'), False)}, 'leave one backend on'),
    ],
)
def test_refusals(settings, says):
    with pytest.raises(FlagError, match=says):
        Attend(**settings)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(FlagError) as caught:
        Attend(flash=True, sigmoid=True, hard=True, selective=True)
    assert len(caught.value.sentences) == 4


def test_bad_calls():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 3, 8)
    with pytest.raises(ValueError, match='divides the 4 query heads, got 3'):
        Attend()(q, k, k)
    with pytest.raises(TypeError, match='mask must be a boolean tensor'):
        Attend()(q, q, q, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match='one value for each key'):
        Attend()(q, q, q[:, :, :2])
    with pytest.raises(ValueError, match='k must have the batch and the channels of q, 2 and 8, got shape'):
        Attend()(q, q[..., :4], q)
    with pytest.raises(ValueError, match='k must have the batch and the channels of q'):
        Attend()(q, torch.randn(3, 4, 3, 8), torch.randn(3, 4, 3, 8))
    with pytest.raises(ValueError, match=r'mask must have shape \(2, 3\), one entry per key, got shape \(2, 2\)'):
        Attend()(q, q, q, mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match=r'mask must be \(i j\), .* got shape \(2, 4, 3, 2\)'):
        Attend()(q, q, q, mask=torch.ones(2, 4, 3, 2).bool())
    with pytest.raises(ValueError, match=r'prev_attn must be .* got shape \(2, 3, 3, 3\)'):
        Attend()(q, q, q, prev_attn=torch.zeros(2, 3, 3, 3))
    with pytest.raises(TypeError, match='q must hold floating point numbers'):
        Attend()(q.long(), q, q)
    with pytest.raises(TypeError, match='v must be a tensor, got NoneType'):
        Attend()(q, q, None)
    # one row of keys, and a mask of one row, serve all
    out, _ = Attend()(q, q[:1], q[:1], mask=torch.ones(1, 3).bool())
    assert out.shape == q.shape
    with pytest.raises(ValueError, match='prev_attn must be None with flash=True'):
        Attend(flash=True)(q, q, q, prev_attn=torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match='the batch must be 1'):
        Attend()(q, q, q, flash_pack_seq_kwargs={'cu_seqlens_q': torch.tensor([0, 3]), 'cu_seqlens_k': torch.tensor([0, 3])})


def test_keyword_only_copyable_and_rebuildable():
    kinds = {p.kind for p in inspect.signature(Attend).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    torch.manual_seed(0)
    attend = Attend(heads=2, pre_talking_heads=True, head_learned_sink=True, causal=True)
    torch.nn.init.normal_(attend.head_attn_sink)
    q = torch.randn(1, 2, 4, 8)
    other = copy.deepcopy(attend)
    torch.testing.assert_close(other(q, q, q)[0], attend(q, q, q)[0])
    torch.nn.init.normal_(other.head_attn_sink)
    assert not torch.equal(other(q, q, q)[0], attend(q, q, q)[0])
    with torch.device('meta'):
        empty = Attend(heads=2, pre_talking_heads=True, head_learned_sink=True, causal=True)
    empty.to_empty(device='cpu').reset_parameters()
    assert empty.head_attn_sink.tolist() == [0, 0]
    assert list(empty.state_dict()) == list(attend.state_dict())


def test_explain():
    q = torch.randn(1, 2, 4, 8)
    assert Attend(causal=True).explain(q, q, q).startswith('sdpa runs')
    assert 'sigmoid is not a softmax' in Attend(sigmoid=True).explain(q, q, q)


def test_small_helpers(capsys):
    t = torch.arange(24).view(2, 3, 4)
    packed, shape = pack_one(t, '* d')
    assert packed.shape == (6, 4)
    assert torch.equal(unpack_one(packed[:, :2], shape, '* d'), t[..., :2])
    middle, shape = pack_one(torch.zeros(2, 3, 4, 5), 'b * d')
    assert middle.shape == (2, 12, 5)
    assert unpack_one(middle, shape, 'b * d').shape == (2, 3, 4, 5)
    assert compact([1, None, 0]) == [1, 0]
    say = once(print)
    say('a')
    say('b')
    assert capsys.readouterr().out == 'a\n'
    assert set(table.__all__) <= set(dir(table))


@pytest.mark.parametrize('flash', [False, True])
def test_a_query_that_sees_nothing_gives_zero(flash):
    """Its keys are padding or in the future. The original lets it see everything, unless flash is asked for."""
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    seen = torch.tensor([[False, False, True, True, True], [True] * 5])
    out, _ = Attend(causal=True, flash=flash)(q, k, v, mask=seen)
    assert (out[0, :, :2] == 0).all()
    assert (out[0, :, 2:] != 0).all()
    assert (out[1] != 0).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
