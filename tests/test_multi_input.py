"""MultiInputTransformerWrapper."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from x_transformers import Decoder, Encoder, InertFlagWarning, MultiInputTransformerWrapper
from x_transformers.flags.base import FlagError, UnknownFlag

B, N = 3, 7
SIZES = {'note': 12, 'pitch': 7}
STACK = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
Inputs = dict[str, Tensor]


def make(stack: dict | None = None, layers: type = Decoder, **flags) -> MultiInputTransformerWrapper:
    torch.manual_seed(0)
    given = {'num_tokens': SIZES, 'max_seq_len': 16, **flags}
    return MultiInputTransformerWrapper(attn_layers=layers(**STACK, **(stack or {})), **given).eval()


@pytest.fixture
def x() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(0, size, (B, N), generator=generator) for name, size in SIZES.items()}


def part(x: Inputs, low: int, high: int) -> Inputs:
    return {name: ids[:, low:high] for name, ids in x.items()}


def same(one: Inputs, other: Inputs) -> None:
    assert list(one) == list(other) == list(SIZES)
    for name in SIZES:
        torch.testing.assert_close(one[name], other[name])


def test_order_of_what_happens_to_the_inputs(x):
    net = make(emb_dim=12, post_emb_norm=True)
    more, front = torch.randn(B, N, 12), torch.randn(B, 2, 12)
    tables = net.embeds['note_embed'].weight[x['note']] + net.embeds['pitch_embed'].weight[x['pitch']]
    embeds = torch.cat((front, net.post_emb_norm(tables + net.pos_emb(x['note']) + more)), dim=1)
    h = net.attn_layers(net.project_emb(embeds))
    out = net(x, sum_embeds=more, prepend_embeds=front)
    same(out, {name: h @ net.to_logits[name].weight.T for name in SIZES})
    assert out['note'].shape == (B, N + 2, 12)


def test_position_embeddings_of_your_own(x):
    net = make(post_emb_norm=True)
    pos = torch.randn(N, 16)
    expected = net(x, sum_embeds=(pos - net.pos_emb(x['note'])).expand(B, -1, -1))
    same(net(x, pos=pos), expected)


def test_memory_tokens_with_a_prefix(x):
    net = make(num_memory_tokens=3)
    front = torch.randn(B, 2, 16)
    (out, h), record = net(x, prepend_embeds=front, return_logits_and_embeddings=True, return_intermediates=True)
    assert h.shape == (B, N + 2, 16)
    whole = net.attn_layers(torch.cat((net.memory_tokens.expand(B, -1, -1), record.initial_embeds), dim=1))
    torch.testing.assert_close(h, whole[:, 3:])
    same(out, {name: net.to_logits[name](h) for name in SIZES})


@pytest.mark.parametrize('front', [0, 2])
def test_memory_tokens_in_front_of_every_window(x, front):
    net = make(num_memory_tokens=2, memory_tokens_interspersed_every=3)
    prefix = {'prepend_embeds': torch.randn(B, front, 16)} if front else {}
    h, record = net(x, return_embeddings=True, return_intermediates=True, **prefix)
    rows, kept = [], []
    for place in range(front + N):
        if place % 3 == 0:
            rows += [net.memory_tokens[i].expand(B, -1) for i in range(2)]
        kept.append(len(rows))
        rows.append(record.initial_embeds[:, place])
    torch.testing.assert_close(h, net.attn_layers(torch.stack(rows, dim=1))[:, kept])
    assert record.memory_tokens.shape == (B * 3, 2, 16)


def test_z_loss_has_the_constructor_s_weight_unless_given(x):
    net = make(attn_z_loss_weight=0.5)
    _, record = net(x, return_attn_z_loss=True)
    scores = [each.pre_softmax_attn for each in record.attn_intermediates]
    expected = sum(each.logsumexp(dim=-1) for each in scores).square().sum(dim=1).mean()
    torch.testing.assert_close(record.attn_z_loss, expected * 0.5)
    _, record = net(x, return_attn_z_loss=True, attn_z_loss_weight=2.0)
    torch.testing.assert_close(record.attn_z_loss, expected * 2.0)


def test_fraction_of_the_gradient(x):
    whole, part_of_it = make(), make(emb_frac_gradient=0.25)
    same(whole(x), part_of_it(x))
    for net in (whole, part_of_it):
        net(x)['note'].square().mean().backward()
    table, head = (lambda net: net.embeds['pitch_embed'].weight.grad), (lambda net: net.to_logits['note'].weight.grad)
    torch.testing.assert_close(table(part_of_it), table(whole) * 0.25)
    torch.testing.assert_close(head(part_of_it), head(whole))


def test_memories_continue_a_segment(x):
    net = make(stack={'rotary_pos_emb': True}, max_mem_len=8)
    _, mems = net(part(x, 0, 3), return_mems=True)
    out, mems = net(part(x, 3, 5), mems=mems, return_mems=True)
    assert [mem.shape[1] for mem in mems] == [5, 5]
    same(out, part(net(part(x, 0, 5)), 3, 5))


RETURNS = (
    'return_embeddings',
    'return_logits_and_embeddings',
    'return_intermediates',
    'return_mems',
    'return_attn',
    'return_attn_z_loss',
)


@pytest.mark.parametrize('asked', [names for k in range(7) for names in itertools.combinations(RETURNS, k)])
def test_every_combination_of_returns(x, asked):
    net = make(max_mem_len=4)
    out = net(x, **dict.fromkeys(asked, True))
    if {'return_intermediates', 'return_attn_z_loss'} & set(asked):
        out, record = out
        assert (record.mems is not None) == ('return_mems' in asked)
        assert (record.attn_z_loss is not None) == ('return_attn_z_loss' in asked)
    elif 'return_mems' in asked:
        out, mems = out
        assert [mem.shape for mem in mems] == [(B, 4, 16)] * 2
    elif 'return_attn' in asked:
        out, maps = out
        torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(B, 2, N))
    h, logits = net(x, return_embeddings=True), net(x)
    if 'return_logits_and_embeddings' in asked:
        same(out[0], logits)
        torch.testing.assert_close(out[1], h)
    elif 'return_embeddings' in asked:
        torch.testing.assert_close(out, h)
    else:
        same(out, logits)


def test_a_model_without_logits(x):
    net = make(return_only_embed=True)
    assert net(x).shape == (B, N, 16)
    assert not any(key.startswith('to_logits') for key in net.state_dict())
    with pytest.raises(ValueError, match='return_only_embed'):
        net(x, return_logits_and_embeddings=True)


# ---------------------------------------------------------------- laws

VARIANTS = [
    {},
    {'emb_dim': 12},
    {'num_memory_tokens': 2},
    {'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 3},
    {'scaled_sinu_pos_emb': True},
]


@pytest.mark.parametrize('flags', VARIANTS)
def test_no_token_sees_a_later_one(x, flags):
    net = make(**flags)
    changed = {name: torch.cat((ids[:, :4], (ids[:, 4:] + 1) % SIZES[name]), dim=1) for name, ids in x.items()}
    one, other = net(x), net(changed)
    same(part(one, 0, 4), part(other, 0, 4))
    assert not torch.allclose(one['note'][:, 4:], other['note'][:, 4:])


@pytest.mark.parametrize('layers', [Decoder, Encoder])
@pytest.mark.parametrize('memory', [None, 2])
def test_padding_is_not_seen_and_rows_are_independent(x, layers, memory):
    net = make(layers=layers, num_memory_tokens=memory)
    lens = [7, 4, 5]
    mask = torch.arange(N) < torch.tensor(lens)[:, None]
    out = net(x, mask=mask)
    other = net({name: ids.masked_fill(~mask, 2) for name, ids in x.items()}, mask=mask)
    for b, length in enumerate(lens):
        alone = net({name: ids[b : b + 1, :length] for name, ids in x.items()})
        for name in SIZES:
            torch.testing.assert_close(out[name][b, :length], other[name][b, :length])
            torch.testing.assert_close(out[name][b, :length], alone[name][0])


@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('front', [0, 2])
def test_cached_is_uncached(x, stack, whole, front):
    net = make(stack)
    prefix = {'prepend_embeds': torch.randn(B, front, 16)} if front else {}
    out, record = net(part(x, 0, 3), return_intermediates=True, **prefix)
    parts = [out]
    for low, high in ((3, 4), (4, 6), (6, 7)):
        new = {} if whole else {'input_not_include_cache': True}
        given = part(x, 0 if whole else low, high)
        out, record = net(given, cache=record, return_intermediates=True, logits_last=high - low, **new)
        parts.append(out)
    same({name: torch.cat([each[name] for each in parts], dim=1) for name in SIZES}, net(x, **prefix))


@pytest.mark.parametrize('flags', VARIANTS)
def test_saved_loaded_and_built_without_memory(x, flags):
    net, twin = make(**flags), make(**flags)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(net.state_dict())
    same(twin(x), net(x))
    with torch.device('meta'):
        empty = make(**flags)
    assert empty(part({name: ids.to('meta') for name, ids in x.items()}, 0, N))['note'].is_meta
    filled = empty.to_empty(device='cpu')
    filled.reset_parameters()
    assert all(torch.isfinite(logits).all() for logits in filled(x).values())
    assert abs(filled.embeds['note_embed'].weight.std() - 1) < 0.3
    assert list(filled.state_dict()) == list(net.state_dict())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('change', 'error', 'match'),
    [
        ({'pitch': None}, ValueError, 'missing: pitch'),
        ({'tempo': torch.zeros(B, N, dtype=torch.long)}, ValueError, 'unknown: tempo'),
        ({'pitch': torch.zeros(B, N - 1, dtype=torch.long)}, ValueError, 'one shape'),
        ({'pitch': torch.full((B, N), 0.5)}, TypeError, 'integers'),
        ({'pitch': torch.full((B, N), 7)}, IndexError, r"x\['pitch'\]"),
    ],
)
def test_inputs_that_do_not_fit(x, change, error, match):
    given = {name: ids for name, ids in {**x, **change}.items() if ids is not None}
    with pytest.raises(error, match=match):
        make()(given)


def test_what_is_no_dictionary_is_refused(x):
    with pytest.raises(TypeError, match='note, pitch'):
        make()(x['note'])
    net = make(num_memory_tokens=2)
    _, record = net(x, return_intermediates=True)
    with pytest.raises(ValueError, match='num_memory_tokens'):
        net(x, cache=record)


@pytest.mark.parametrize(
    ('flags', 'match'),
    [
        ({'num_tokens': {}}, 'at least one input'),
        ({'num_tokens': {'note': 0}}, 'whole number from 1'),
        ({'num_tokens': {'note.pitch': 3}}, 'without dots'),
        ({'num_tokens': {'keys': 3}}, 'without dots'),
        ({'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 2, 'layers': Encoder}, 'Decoder'),
        ({'scaled_sinu_pos_emb': True, 'emb_dim': 5}, 'even'),
    ],
)
def test_flags_that_do_not_go_together(flags, match):
    with pytest.raises(FlagError, match=match):
        make(**flags)
    with pytest.warns(InertFlagWarning, match='num_memory_tokens'):
        make(memory_tokens_interspersed_every=2)
    with pytest.raises(UnknownFlag, match='unrecognized kwargs'):
        make(tie_embedding=True)
