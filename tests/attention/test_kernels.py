"""Every kernel gives what the written-out formula gives, and has the reference's gradients."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from x_transformers.attention.attend import ORDER, Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels import block_steps
from x_transformers.attention.kernels.base import CallFacts, Needs
from x_transformers.attention.kernels.block_steps import InBlocks, blocks_of
from x_transformers.attention.kernels.choose import KERNELS, NAMES, choose_kernel, explain, use_kernel
from x_transformers.attention.mask import Mask
from x_transformers.attention.refusals import fused_refusals
from x_transformers.attention.scores.base import Form, ScoreRule
from x_transformers.flags.scores import AttendFlags

from .formula import FixedBias, attention

SCALE, B, H, D = 0.4, 2, 4, 4


def draw(seed: int) -> tuple[ScoreShape, int, int, dict, dict, torch.Tensor | None]:
    """(geometry, kv heads, value width, settings of Attend, fields of Mask, bias over own keys)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, front = rng.choice([1, 2, 7]), rng.choice([0, 0, 1, 2])
    own = max(n - 2, 1) if rng.random() < 0.1 else n + rng.choice([0, 0, 3])
    geometry = ScoreShape(n, own + front, front)
    settings = {
        'l2_distance': rng.random() < 0.2,
        'head_learned_sink': rng.random() < 0.25,
        'softclamp_logits': rng.random() < 0.3,
        'add_zero_kv': rng.random() < 0.2,
    }
    mask: dict = {'causal': rng.random() < 0.6, 'past': rng.choice([None, None, 0, 2])}
    if not mask['causal'] and seed % 2:
        mask['ahead'] = seed % 3
    if rng.random() < 0.5:
        mask['keys'] = torch.rand(B, own) > 0.5
    if rng.random() < 0.3:
        mask['dense'] = torch.rand(*rng.choice([(n, own), (H, n, own), (B, 1, n, own), (B, H, n, own + front)])) > 0.3
    if front and rng.random() < 0.4:
        mask['front'] = torch.rand(B, rng.choice([1, front])) > 0.5
    if mask['causal'] and rng.random() < 0.3:
        mask['prefix'] = rng.choice([2, torch.tensor([1, 3])])
    shape = rng.choice([None, None, (1, H, n, own), (B, 1, n, own), (1, H, 1, own)])
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64)
    return geometry, rng.choice([1, 2, 4]), rng.choice([D, D + 2, 2]), settings, mask, bias


@pytest.mark.parametrize('seed', range(60))
def test_kernels_agree(seed, monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    geometry, kv_heads, width, settings, fields, bias = draw(seed)
    attend = Attend(heads=H, logit_softclamp_value=2.0, scale=SCALE, **settings).double()
    sink = attend.head_attn_sink
    if sink is not None:
        torch.nn.init.normal_(sink)
    shapes = (H, geometry.queries, D), (kv_heads, geometry.keys, D), (kv_heads, geometry.keys, width)
    given = [torch.randn(B, *shape, dtype=torch.float64) for shape in shapes] + ([] if bias is None else [bias])
    q, k, v = given[:3]
    zero = settings['add_zero_kv']
    want = attention(
        q,
        F.pad(k, (0, 0, 1, 0)) if zero else k,
        F.pad(v, (0, 0, 1, 0)) if zero else v,
        geometry.with_front(1) if zero else geometry,
        scale=SCALE,
        bias=None if bias is None else FixedBias(bias),
        clamp=2.0 if settings['softclamp_logits'] else None,
        sink=None if sink is None else sink.tolist(),
        l2=settings['l2_distance'],
        **fields,
    )
    weight = torch.randn_like(want)
    expected = None
    for name in ('reference', 'blocks', *(() if settings['softclamp_logits'] else ('sdpa',))):
        leaves = [t.clone().requires_grad_() for t in given]
        with use_kernel(name):
            added = FixedBias(leaves[3]) if bias is not None else None
            out, _ = attend.run(*leaves[:3], mask=Mask(**fields), geometry=geometry, bias=added)
        torch.testing.assert_close(out, want, atol=1e-9, rtol=0, msg=lambda m, name=name: f'{name}: {m}')
        leaves += [] if sink is None else [sink]
        grads = torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)
        expected = grads if expected is None else expected
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, atol=1e-9, rtol=0, msg=lambda m, name=name: f'{name}: {m}')


MIXERS = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')


@pytest.mark.parametrize('seed', range(60))
def test_rules_on_whole_rows_and_all_heads_in_blocks(seed, monkeypatch):
    """Outputs and gradients of the reference, those of everything that learns."""
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    geometry, kv_heads, width, settings, fields, bias = draw(seed)
    rng = random.Random(seed)
    settings |= {'l2_distance': False, **rng.choice([{}, {'sparse_topk': 2}, {'sigmoid': True}])}
    settings['head_learned_sink'] &= not settings.get('sigmoid')
    mixing = [name for name in MIXERS if rng.random() < 0.5] if rng.random() < 0.8 else []
    if mixing and 'dense' in fields and fields['dense'].ndim > 2:
        fields['dense'] = fields['dense'][..., :1, :, :]
    attend = Attend(heads=H, logit_softclamp_value=2.0, scale=SCALE, **settings, **dict.fromkeys(mixing, True)).double()
    for parameter in attend.parameters():
        torch.nn.init.normal_(parameter)
    shapes = (H, geometry.queries, D), (kv_heads, geometry.keys, D), (kv_heads, geometry.keys, width)
    given = [torch.randn(B, *shape, dtype=torch.float64) for shape in shapes] + ([] if bias is None else [bias])
    found = {}
    for name in ('reference', 'blocks'):
        leaves = [t.clone().requires_grad_() for t in given]
        with use_kernel(name):
            added = FixedBias(leaves[3]) if bias is not None else None
            out, _ = attend.run(*leaves[:3], mask=Mask(**fields), geometry=geometry, bias=added)
        leaves += attend.parameters()
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found[name] = [out, *torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)]
    for number, (got, want) in enumerate(zip(found['blocks'], found['reference'], strict=True)):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0, msg=lambda m, number=number: f'{number}: {m}')


def test_heads_that_see_different_keys_are_mixed_by_the_reference():
    q = torch.randn(B, H, 3, D)
    attend, mask = Attend(heads=H, post_talking_heads=True), torch.rand(B, H, 3, 3) > 0.5
    with use_kernel('blocks'), pytest.raises(ValueError, match='heads are mixed that see different keys'):
        attend(q, q, q, mask=mask)
    assert attend(q, q, q, mask=mask)[0].shape == q.shape


@pytest.mark.parametrize('name', ['sdpa', 'blocks', 'reference'])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_autocast_and_single_precision(name, kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 9, 8), torch.randn(B, kv_heads, 9, 8), torch.randn(B, kv_heads, 9, 8)
    keys = torch.rand(B, 9) > 0.4
    keys[0, :3] = False
    mask = Mask(keys=keys, causal=True)
    want = attention(q, k, v, ScoreShape(9, 9), scale=8**-0.5, causal=True, keys=keys)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    with use_kernel(name):
        single, _ = Attend().run(q, k, v, mask=mask, geometry=ScoreShape(9, 9))
        with torch.autocast(q.device.type, torch.bfloat16):
            half, _ = Attend().run(q, k, v, mask=mask, geometry=ScoreShape(9, 9))
    torch.testing.assert_close(single.double(), want, atol=1e-5, rtol=0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), want, atol=0.05, rtol=0)
    assert (half[0, :, :3] == 0).all()
    assert (single[0, :, :3] == 0).all()
    half.float().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (q, k, v))


def test_flex_in_the_eager_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 5, 16), torch.randn(B, 2, 7, 16), torch.randn(B, 2, 7, 16)
    keys = torch.rand(B, 6) > 0.4
    attend = Attend(heads=H, softclamp_logits=True, logit_softclamp_value=2.0, head_learned_sink=True)
    torch.nn.init.normal_(attend.head_attn_sink)
    bias, geometry = torch.randn(1, H, 5, 6), ScoreShape(5, 7, 1)
    sink = attend.head_attn_sink.tolist()

    def compared(distance):
        with torch.no_grad(), use_kernel('flex'):
            out, _ = attend.run(q, k, v, mask=Mask(**distance, keys=keys), geometry=geometry, bias=FixedBias(bias))
        want = attention(q, k, v, geometry, scale=0.25, bias=FixedBias(bias), clamp=2.0, sink=sink, keys=keys, **distance)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)

    # not compiled here: torch says so once
    with pytest.warns(UserWarning, match='flex_attention called without torch.compile'):
        compared({'causal': True, 'past': 3})
    compared({'past': 1, 'ahead': 2})


def test_packed_sequences_are_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, H, 7, D), torch.randn(1, 2, 7, D), torch.randn(1, 2, 7, D)
    starts = torch.tensor([0, 3, 7])
    attend = Attend(causal=True, flash=True, flash_pack_seq=True)
    out, _ = attend(q, k, v, flash_pack_seq_kwargs={'cu_seqlens_q': starts, 'cu_seqlens_k': starts})
    for begin, end in ((0, 3), (3, 7)):
        alone, _ = attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
        torch.testing.assert_close(out[:, :, begin:end], alone)


def test_backends_can_be_restricted():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    math_only = Attend(causal=True, sdp_kwargs={'enable_flash': False, 'enable_math': True, 'enable_mem_efficient': False})
    assert math_only.backends == ('MATH',)
    assert Attend().backends is None
    torch.testing.assert_close(math_only(q, k, v)[0], Attend(causal=True)(q, k, v)[0])


def call(**facts) -> CallFacts:
    plain = {
        'device': 'cpu', 'dtype': torch.float32, 'gradients': True, 'dropout': False, 'heads': 8, 'kv_heads': 8,
        'key_dim': 64, 'value_dim': 64, 'geometry': ScoreShape(1024, 1024), 'plain_causal': True, 'causal': True,
    }  # fmt: skip
    return CallFacts(**{**plain, **facts})


@pytest.mark.parametrize(
    ('needs', 'facts', 'chosen'),
    [
        (Needs(), {}, 'sdpa'),
        (Needs(), {'dropout': True}, 'reference'),
        (Needs(), {'dropout': True, 'device': 'cuda'}, 'sdpa'),
        (Needs(), {'windowed': True}, 'blocks'),
        (Needs(), {'learned_bias': True}, 'blocks'),
        (Needs(), {'by_distance': True}, 'blocks'),
        (Needs(), {'by_distance': True, 'geometry': ScoreShape(128, 128)}, 'sdpa'),
        (Needs(), {'by_distance': True, 'device': 'cuda'}, 'sdpa'),
        (Needs(), {'previous': True}, 'reference'),
        (Needs(), {'return_scores': True}, 'reference'),
        (Needs(), {'packed': True}, 'sdpa'),
        (Needs(), {'packed': True, 'device': 'cuda', 'dtype': torch.bfloat16}, 'varlen'),
        (Needs(pointwise=('softclamp_logits',)), {}, 'blocks'),
        (Needs(pointwise=('softclamp_logits',)), {'device': 'cuda'}, 'flex'),
        (Needs(pointwise=('softclamp_logits',)), {'geometry': ScoreShape(1, 9)}, 'reference'),
        (Needs(pointwise=('softclamp_logits',)), {'device': 'cuda', 'biased': True}, 'blocks'),
        (Needs(pointwise=('softclamp_logits',)), {'device': 'cuda', 'biased': True, 'dtype': torch.bfloat16}, 'flex'),
        (Needs(sink=True), {}, 'blocks'),
        (Needs(unfused=(('selective', 'rows meet'),)), {}, 'reference'),
        (Needs(weights='sigmoid'), {}, 'blocks'),
        (Needs(weights='sparse_topk'), {}, 'blocks'),
        (Needs(weights='hard'), {'device': 'cuda'}, 'reference'),
        (Needs(whole=('post_talking_heads',)), {}, 'blocks'),
        (Needs(whole=('post_talking_heads',)), {'masked_heads': True}, 'reference'),
        (Needs(onnxable=True), {}, 'reference'),
    ],
)
def test_choice(needs, facts, chosen):
    assert choose_kernel(needs, call(**facts)).name == chosen
    text = explain(needs, call(**facts))
    assert text.startswith(f'{chosen} runs')
    assert len(text.splitlines()) == len(NAMES)


def test_forcing_a_kernel_that_cannot():
    q = torch.randn(1, 2, 3, 4)
    with use_kernel('sdpa'), pytest.raises(ValueError, match='sdpa kernel cannot run this attention: sigmoid is not a softmax'):
        Attend(sigmoid=True)(q, q, q)
    with pytest.raises(ValueError, match=r'name must be one of .*fast'), use_kernel('fast'):
        pass
    assert Attend(sigmoid=True)(q, q, q)[0].shape == q.shape


@pytest.mark.parametrize('name', sorted({rule.name for rule in ORDER} & set(AttendFlags.flag_fields()) - {'dropout'}))
def test_flags_that_demand_a_fused_kernel_are_refused_where_there_is_none(name):
    """What a rule says of fused kernels is what the kernels say, alone and with dropout."""
    settings = {name: {'sparse_topk': 3, 'custom_attn_fn': torch.relu}.get(name, True)}
    settings |= {'sparse_topk': 3} if name == 'sparse_topk_straight_through' else {}
    needs = Attend(heads=H, causal=name != 'inverted_attention', **settings).needs
    for dropout in (0.0, 0.1):
        calls = [
            call(dropout=dropout > 0),
            *(call(dropout=dropout > 0, device='cuda', dtype=t) for t in (torch.float32, torch.bfloat16)),
        ]
        carried = any(not kernel.refusals(needs, facts) for kernel in KERNELS[:-1] for facts in calls)
        assert carried == (not fused_refusals(AttendFlags(flash=True, dropout=dropout, **settings), ORDER))


def test_a_rule_that_says_nothing_of_kernels_is_left_to_the_reference():
    class Halve(ScoreRule):
        name, form = 'halve', Form.POINTWISE

    needs = Needs.of((Halve,))
    assert needs.unfused == (('halve', 'no fused kernel knows it'),)
    for device in ('cpu', 'cuda'):
        assert choose_kernel(needs, call(device=device)).name == 'reference'


SETTINGS = [
    {},
    {'softclamp_logits': True},
    {'head_learned_sink': True},
    {'pre_talking_heads': True},
    {'post_talking_heads': True, 'pre_scale_post_talking_heads': True},
    {'sparse_topk': 2},
    {'sigmoid': True},
    {'selective': True},
    {'scalable_softmax': True},
]


@pytest.mark.filterwarnings('ignore:.*should not be instantiated')
@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_one_graph(settings, monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    torch._dynamo.reset()
    torch.manual_seed(0)
    attend = Attend(heads=H, causal=True, **settings)

    def attention_with_padding(q, keys):
        return attend.run(q, q, q, mask=Mask(keys=keys).narrowed(True, 3), geometry=ScoreShape(6, 6))[0]

    q, keys = torch.randn(B, H, 6, 8), torch.rand(B, 6) > 0.3
    compiled = torch.compile(attention_with_padding, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(q, keys), attention_with_padding(q, keys))


@pytest.mark.parametrize('width', [4, 8])
def test_the_scores_of_a_block_take_no_more_memory_than_its_keys(width, monkeypatch):
    made = []
    apply = InBlocks.apply
    monkeypatch.setattr(InBlocks, 'apply', lambda shape, *tensors: made.append(shape) or apply(shape, *tensors))
    q, k = torch.randn(1, H, 20, width), torch.randn(1, H, 20, width)
    attend = Attend(heads=H, causal=True, softclamp_logits=True)
    attend.run(q, k, k, mask=Mask().narrowed(True, None), geometry=ScoreShape(20, 20))
    (shape,) = made
    assert [block.bottom - block.top for block in blocks_of(shape)] == [width] * (20 // width) + [20 % width] * bool(20 % width)


def test_a_mask_that_is_used_again_remembers_no_kernel_of_another_demand() -> None:
    attend = Attend(heads=2, causal=True)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    mask, geometry = Mask(causal=True), ScoreShape(5, 5)
    attend.run(q, k, v, mask=mask, geometry=geometry)
    with use_kernel('varlen'), pytest.raises(ValueError, match='varlen kernel cannot run'):
        attend.run(q, k, v, mask=mask, geometry=geometry)
    attend.run(q, k, v, mask=mask, geometry=geometry)
