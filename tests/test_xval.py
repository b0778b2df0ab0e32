"""XValTransformerWrapper and XValAutoregressiveWrapper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Decoder, Encoder, XValAutoregressiveWrapper, XValTransformerWrapper
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.xval import GenerateReturn, LossBreakdown

B, N, V, NUMBER = 3, 7, 9, 3
STACK = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
LENS = [7, 4, 5]
MASK = torch.arange(N) < torch.tensor(LENS)[:, None]


def make(stack: dict | None = None, layers: type = Decoder, **flags) -> XValTransformerWrapper:
    torch.manual_seed(0)
    given = {'num_tokens': V, 'max_seq_len': 16, 'numerical_token_id': NUMBER, **flags}
    return XValTransformerWrapper(attn_layers=layers(**STACK, **(stack or {})), **given).eval()


def train(net: XValTransformerWrapper, **options) -> XValAutoregressiveWrapper:
    return XValAutoregressiveWrapper(net, **options)


@pytest.fixture
def x() -> Tensor:
    ids = torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(1))
    ids[:, 2], ids[0, 5], ids[2, 1] = NUMBER, NUMBER, NUMBER
    return ids


@pytest.fixture
def num(x: Tensor) -> Tensor:
    numbers = torch.randn(B, N, generator=torch.Generator().manual_seed(2))
    return torch.where(x == NUMBER, numbers, torch.nan)


def same(one: tuple, other: tuple) -> None:
    assert len(one) == len(other) == 2
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize('flags', [{}, {'emb_dim': 12}, {'tie_embedding': True}, {'logits_dim': 4}])
def test_a_number_scales_its_token(x, num, flags):
    net = make(**flags)
    table, rows = net.token_emb.emb.weight, []
    for b, n in itertools.product(range(B), range(N)):
        rows.append(table[x[b, n]] * (num[b, n] if x[b, n] == NUMBER else 1.0))
    embeds = torch.stack(rows).view(B, N, -1) + net.pos_emb(x)
    front = torch.randn(B, 2, embeds.shape[-1])
    h = net.attn_layers(net.project_emb(torch.cat((front, embeds), dim=1)))
    logits, numbers = net(x, num, prepend_embeds=front)
    torch.testing.assert_close(logits, h @ table.T if 'tie_embedding' in flags else net.to_logits(h))
    torch.testing.assert_close(numbers, (h @ net.to_numerical_output[0].weight[0]) + net.to_numerical_output[0].bias)
    assert logits.shape == (B, N + 2, flags.get('logits_dim', V))


def test_memory_tokens_with_mask_and_prefix(x, num):
    net = make(layers=Encoder, num_memory_tokens=2)
    front = torch.randn(B, 2, 16)
    h, record = net(x, num, mask=MASK, prepend_embeds=front, return_embeddings=True, return_intermediates=True)
    whole = torch.cat((net.memory_tokens.expand(B, -1, -1), record.initial_embeds), dim=1)
    expected = net.attn_layers(whole, mask=F.pad(MASK, (4, 0), value=True))
    torch.testing.assert_close(h, expected[:, 2:])


RETURNS = ('return_embeddings', 'return_intermediates', 'return_mems', 'return_attn')


@pytest.mark.parametrize('asked', [names for k in range(5) for names in itertools.combinations(RETURNS, k)])
def test_every_combination_of_returns(x, num, asked):
    net = make(max_mem_len=4)
    out = net(x, num, **dict.fromkeys(asked, True))
    if 'return_intermediates' in asked:
        out, record = out
        assert (record.mems is not None) == ('return_mems' in asked)
    elif 'return_mems' in asked:
        out, mems = out
        assert [mem.shape for mem in mems] == [(B, 4, 16)] * 2
    elif 'return_attn' in asked:
        out, maps = out
        torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(B, 2, N))
    if 'return_embeddings' in asked:
        torch.testing.assert_close(out, net(x, num, return_embeddings=True))
    else:
        same(out, net(x, num))


def test_memories_continue_a_segment(x, num):
    net = make(stack={'rotary_pos_emb': True}, max_mem_len=8)
    _, mems = net(x[:, :3], num[:, :3], return_mems=True)
    out, _ = net(x[:, 3:5], num[:, 3:5], mems=mems, return_mems=True)
    same(out, tuple(each[:, 3:] for each in net(x[:, :5], num[:, :5])))


# ---------------------------------------------------------------- laws

VARIANTS = [{}, {'emb_dim': 12}, {'num_memory_tokens': 2}, {'tie_embedding': True}, {'scaled_sinu_pos_emb': True}]


@pytest.mark.parametrize('flags', VARIANTS)
def test_no_token_sees_a_later_one(x, num, flags):
    net = make(**flags)
    changed = num.clone()
    changed[0, 5] += 1
    one, other = net(x, num), net(x, changed)
    same(tuple(each[:, :5] for each in one), tuple(each[:, :5] for each in other))
    assert not torch.allclose(one[1][0, 5:], other[1][0, 5:])
    ids = torch.cat((x[:, :4], torch.full((B, 3), 8)), dim=1)
    same(tuple(each[:, :4] for each in net(ids, num)), tuple(each[:, :4] for each in one))


@pytest.mark.parametrize('layers', [Decoder, Encoder])
@pytest.mark.parametrize('memory', [None, 2])
def test_padding_is_not_seen_and_rows_are_independent(x, num, layers, memory):
    net = make(layers=layers, num_memory_tokens=memory)
    out = net(x, num, mask=MASK)
    other = net(x.masked_fill(~MASK, NUMBER), num.masked_fill(~MASK, 50.0), mask=MASK)
    for b, length in enumerate(LENS):
        alone = net(x[b : b + 1, :length], num[b : b + 1, :length])
        same(tuple(each[b, :length] for each in out), tuple(each[b, :length] for each in other))
        same(tuple(each[b, :length] for each in out), tuple(each[0] for each in alone))


@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('front', [0, 2])
def test_cached_is_uncached(x, num, stack, whole, front):
    net = make(stack)
    prefix = {'prepend_embeds': torch.randn(B, front, 16)} if front else {}
    out, record = net(x[:, :3], num[:, :3], return_intermediates=True, **prefix)
    parts = [out]
    for low, high in ((3, 4), (4, 6), (6, 7)):
        new = {} if whole else {'input_not_include_cache': True}
        low = 0 if whole else low
        out, record = net(x[:, low:high], num[:, low:high], cache=record, return_intermediates=True, **new)
        parts.append(out)
    same(tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True)), net(x, num, **prefix))


@pytest.mark.parametrize('flags', VARIANTS)
def test_saved_loaded_and_built_without_memory(x, num, flags):
    net, twin = make(**flags), make(**flags)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(net.state_dict())
    same(twin(x, num), net(x, num))
    with torch.device('meta'):
        empty = make(**flags)
    assert empty(x.to('meta'), num.to('meta'))[0].is_meta
    filled = empty.to_empty(device='cpu')
    filled.reset_parameters()
    assert all(torch.isfinite(each).all() for each in filled(x, num))
    # 144 or 108 draws of deviation one
    assert abs(filled.token_emb.emb.weight.std() - 1) < 5 / math.sqrt(2 * 108)
    assert list(filled.state_dict()) == list(net.state_dict())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize('given', [None, 'whole', 'inputs'])
@pytest.mark.parametrize('front', [0, 2])
def test_loss_by_position(x, num, given, front):
    net = make()
    wrapped = train(net, numerical_loss_weight=0.7)
    ids = x.clone()
    ids[1, 3] = ids[0, 6] = -100
    inputs, targets = {
        None: (None, torch.ones(B, N - 1, dtype=torch.bool)),
        'whole': (MASK[:, :-1], MASK[:, 1:]),
        'inputs': (MASK[:, :-1], MASK[:, :-1]),
    }[given]
    more = {'prepend_embeds': torch.randn(B, front, 16)} if front else {}
    logits, numbers = net(ids[:, :-1].masked_fill(ids[:, :-1] == -100, 0), num[:, :-1], mask=inputs, **more)
    entropy, error, count = torch.zeros(B, N - 1), torch.zeros(B, N - 1), 0
    for b, j in itertools.product(range(B), range(N - 1)):
        target = ids[b, j + 1]
        if target == -100 or not targets[b, j]:
            continue
        count += 1
        entropy[b, j] = -logits[b, front + j].log_softmax(dim=-1)[target]
        if target == NUMBER:
            error[b, j] = (numbers[b, front + j] - num[b, j + 1]) ** 2
    mask = {None: None, 'whole': MASK, 'inputs': MASK[:, :-1]}[given]
    loss, parts = wrapped(ids, num, return_loss_breakdown=True, mask=mask, **more)
    assert isinstance(parts, LossBreakdown)
    torch.testing.assert_close(parts.cross_entropy_loss, entropy)
    torch.testing.assert_close(parts.numerical_mse_loss, error)
    torch.testing.assert_close(loss, (entropy + 0.7 * error).sum() / count)
    torch.testing.assert_close(wrapped(ids, num, mask=mask, **more), loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in wrapped.parameters() if p.grad is not None)


def test_an_ignored_index_that_is_a_token_is_still_read(x, num):
    wrapped = train(make(), ignore_index=5, pad_value=1)
    ids = x.clone()
    ids[:, 0] = 5
    other = ids.clone()
    other[:, 0] = 1
    one, two = wrapped(ids, num), wrapped(other, num)
    assert not torch.allclose(one, two)


# ---------------------------------------------------------------- generation


def by_hand(net, x, num, steps):
    for _ in range(steps):
        logits, numbers = net(x[:, -net.max_seq_len :], num[:, -net.max_seq_len :])
        x = torch.cat((x, logits[:, -1:].argmax(dim=-1)), dim=1)
        num = torch.cat((num, numbers[:, -1:]), dim=1)
    return x, num.masked_fill(x != NUMBER, torch.nan)


@pytest.mark.parametrize('flags', [{}, {'num_memory_tokens': 2}, {'max_seq_len': 8}, {'max_seq_len': 5}])
@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('cache_kv', [False, True])
@torch.no_grad()
def test_the_most_likely_tokens_and_their_numbers(x, num, flags, stack, cache_kv):
    net = make(stack, **flags)
    # numbers are to be among what is generated
    net.to_logits.bias[NUMBER] += 1.0
    wrapped = train(net).train()
    ids, numbers = by_hand(net, x, num, 5)
    made = wrapped.generate(x, num, 5, temperature=0.0, cache_kv=cache_kv)
    assert wrapped.training
    assert isinstance(made, GenerateReturn)
    assert made.is_number_mask.any()
    assert not made.is_number_mask.all()
    torch.testing.assert_close(made.sampled_token_ids, ids[:, N:])
    torch.testing.assert_close(made.sampled_numbers, numbers[:, N:], equal_nan=True)
    torch.testing.assert_close(made.is_number_mask, ids[:, N:] == NUMBER)
    whole = wrapped.generate(x, num, 5, temperature=0.0, cache_kv=cache_kv, include_prompt=True)
    torch.testing.assert_close(whole.sampled_token_ids, ids)
    torch.testing.assert_close(whole.sampled_numbers, numbers, equal_nan=True)
    assert wrapped.generate(x, num, 0).sampled_numbers.shape == (B, 0)


def test_generation_of_prompts_of_different_lengths(x, num):
    wrapped = train(make())
    made = wrapped.generate(x, num, 4, temperature=0.0, prompt_lens=LENS)
    for b, length in enumerate(LENS):
        alone = wrapped.generate(x[b : b + 1, :length], num[b : b + 1, :length], 4, temperature=0.0)
        for one, other in zip(made, alone, strict=True):
            torch.testing.assert_close(one[b], other[0], equal_nan=True)


def test_sampled_tokens_follow_the_net(x, num):
    net = make()
    wrapped = train(net)
    probs = (net(x[:1], num[:1])[0][0, -1] / 2).softmax(dim=-1)
    many = [each[:1].expand(20000, -1) for each in (x, num)]
    made = wrapped.generate(*many, 1, filter_logits_fn=lambda t: t, temperature=2.0, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(made.sampled_token_ids[:, 0], minlength=V)
    chi = ((counts - 20000 * probs) ** 2 / (20000 * probs)).sum()
    # exceeded once in 10 000 times with eight degrees of freedom
    assert chi < 31.8
    again = wrapped.generate(
        *many, 1, filter_logits_fn=lambda t: t, temperature=2.0, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(made.sampled_token_ids, again.sampled_token_ids)


# ---------------------------------------------------------------- bad input


def refuse(error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)


def test_inputs_that_do_not_fit(x, num):
    net = make()
    wrapped = train(net)
    broken = num.masked_fill(x == NUMBER, torch.nan)
    for call in (net, wrapped, lambda *given: wrapped.generate(*given, 2)):
        refuse(ValueError, 'NaN at', call, x, broken)
        refuse(ValueError, 'one shape', call, x, num[:, 1:])
        refuse(TypeError, 'x_num', call, x, x > 0)
        refuse(TypeError, 'integers', call, num, num)
    last = num.clone()
    last[0, -1] = torch.nan
    ids = x.clone()
    ids[0, -1] = NUMBER
    refuse(ValueError, 'NaN at 1', wrapped, ids, last)
    refuse(ValueError, 'mask must cover', wrapped, x, num, mask=torch.ones(B, N + 1, dtype=torch.bool))
    refuse(TypeError, 'boolean', wrapped, x, num, mask=torch.ones(B, N))
    refuse(ValueError, 'at least two', wrapped, x[:, :1], num[:, :1])
    refuse(ValueError, 'seq_len', wrapped.generate, x, num, -1)
    refuse(ValueError, 'temperature', wrapped.generate, x, num, 1, temperature=-1.0)
    refuse(ValueError, 'filter_logits_fn', wrapped.generate, x, num, 1, filter_logits_fn='top_z')
    refuse(ValueError, 'must have at least one token', wrapped.generate, x[:, :0], num[:, :0], 1)


def test_flags_that_do_not_go_together():
    refuse(FlagError, 'one of the vocabulary', make, numerical_token_id=V)
    refuse(FlagError, 'tie_embedding', make, tie_embedding=True, emb_dim=12)
    refuse(FlagError, 'logits_dim', make, tie_embedding=True, logits_dim=4)
    refuse(UnknownFlag, 'unrecognized kwargs', make, post_emb_norm=True)
