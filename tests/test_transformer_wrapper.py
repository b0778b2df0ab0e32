"""TransformerWrapper: what goes in, what comes back, what is remembered, what is refused."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import Decoder, Encoder, PrefixDecoder, TransformerWrapper
from x_transformers.cache.kv_cache import KVCache
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.losses import linear_cross_entropy, token_cross_entropy

TOKENS, LENGTH, DIM = 19, 12, 16
STACK: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def decoder(stack: dict[str, Any] | None = None, **flags: Any) -> TransformerWrapper:
    return build(Decoder(**STACK, **(stack or {})), **flags)


def encoder(stack: dict[str, Any] | None = None, **flags: Any) -> TransformerWrapper:
    return build(Encoder(**STACK, **(stack or {})), **flags)


def build(attn_layers: nn.Module, **flags: Any) -> TransformerWrapper:
    model = TransformerWrapper(**{'num_tokens': TOKENS, 'max_seq_len': 32, 'attn_layers': attn_layers, **flags})
    for parameter in model.parameters():
        # nothing stays at zero, so that every part has a say
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randint(0, TOKENS, (2, LENGTH))


# ---------------------------------------------------------------- forward


def test_logits_by_hand(x: Tensor) -> None:
    model = decoder()
    embeds = model.token_emb.emb.weight[x] + model.pos_emb.emb.weight[:LENGTH] * DIM**-0.5
    torch.testing.assert_close(model(x), model.attn_layers(embeds) @ model.to_logits.weight.t())


def test_embedding_is_laid_together_in_order(x: Tensor) -> None:
    model = encoder(emb_dim=6, post_emb_norm=True, embed_num_tokens={'kind': 3}, emb_frac_gradient=0.5)
    kind, more, front = torch.randint(0, 3, (2, LENGTH)), torch.randn(2, LENGTH, 6), torch.randn(2, 3, 6)
    embeds = model.token_emb(x) + model.pos_emb(x) + model.embeds['kind_embed'].weight[kind] + more
    embeds = torch.cat((front, model.post_emb_norm(embeds)), dim=1)
    wanted = model.to_logits(model.attn_layers(model.project_emb(embeds)))
    got, inter = model(x, embed_ids={'kind': kind}, sum_embeds=more, prepend_embeds=front, return_intermediates=True)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(inter.initial_embeds, embeds)
    assert inter.initial_embed is inter.initial_embeds


def test_position_embeddings_given_from_outside_do_not_reach_the_stack(x: Tensor) -> None:
    model = decoder({'rotary_pos_emb': True, 'disable_abs_pos_emb': False})
    table = torch.randn(LENGTH, DIM)
    wanted = model.to_logits(model.attn_layers(model.token_emb(x) + table))
    torch.testing.assert_close(model(x, pos=table), wanted)
    torch.testing.assert_close(model(x, pos=table.expand(2, -1, -1)), wanted)


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
def test_positions_as_numbers(x: Tensor, dtype: torch.dtype) -> None:
    model = decoder()
    torch.testing.assert_close(model(x, pos=torch.arange(LENGTH, dtype=dtype)), model(x))
    swapped = model(x, pos=torch.arange(LENGTH).flip(0))
    assert not torch.allclose(swapped, model(x))


def test_no_tokens_but_embeddings() -> None:
    model, front = decoder(), torch.randn(2, 3, DIM)
    torch.testing.assert_close(model(None, prepend_embeds=front), model.to_logits(model.attn_layers(front)))
    with pytest.raises(ValueError, match='prepend_embeds'):
        model(None)


def test_float_position_tables_of_unit_length_start_small() -> None:
    model = TransformerWrapper(num_tokens=200, max_seq_len=200, attn_layers=Decoder(**STACK), l2norm_embed=True)
    for table in (model.token_emb.emb.weight, model.pos_emb.emb.weight):
        assert table.std().item() == pytest.approx(1e-5, rel=0.1)
    plain = TransformerWrapper(num_tokens=200, max_seq_len=200, attn_layers=Decoder(**STACK))
    assert plain.token_emb.emb.weight.std().item() == pytest.approx((2 / DIM) ** 0.5, rel=0.1)
    assert plain.pos_emb.emb.weight.std().item() == pytest.approx(1.0, rel=0.1)


def test_built_on_meta_and_filled() -> None:
    options = {'num_memory_tokens': 20, 'use_cls_token': True, 'num_cls_tokens': 20, 'ff_deep_embed': True}
    with torch.device('meta'):
        model = TransformerWrapper(num_tokens=200, max_seq_len=8, attn_layers=Encoder(**STACK), **options)
    model.to_empty(device='cpu').reset_parameters()
    assert model.token_emb.emb.weight.std().item() == pytest.approx((2 / DIM) ** 0.5, rel=0.1)
    assert model.memory_tokens.std().item() == pytest.approx(1.0, rel=0.2)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.ff_deep_embed == 1).all()
    assert model(torch.zeros(1, 4).long()).isfinite().all()


def test_your_own_embedding_is_started_too() -> None:
    class Own(nn.Embedding):
        def init_(self) -> None:
            nn.init.constant_(self.weight, 3.0)

    model = TransformerWrapper(num_tokens=5, max_seq_len=8, attn_layers=Decoder(**STACK), token_emb=Own(5, DIM))
    assert (model.token_emb.weight == 3.0).all()
    nn.init.zeros_(model.token_emb.weight)
    model.reset_parameters()
    assert (model.token_emb.weight == 3.0).all()


# ---------------------------------------------------------------- what comes back


RETURNS = [
    'return_embeddings',
    'return_logits_and_embeddings',
    'return_intermediates',
    'return_embeddings_and_intermediates',
    'return_logit_entropies',
    'return_next_embed_pred',
    'return_mems',
    'return_attn',
    'return_attn_z_loss',
]
HEADS: list[dict[str, Any]] = [
    {},
    {'return_only_embed': True},
    {'tie_embedding': True, 'sigsoftmax_logits': True},
    {'num_output_heads': 2, 'sigsoftmax_logits': True, 'logits_dim': 1, 'squeeze_out_last_dim': True},
    {'mixture_of_softmax': True},
]


def expected(model: TransformerWrapper, asked: set[str], logits: Any, x: Any, has_head: bool) -> list[str]:
    """The shape of the answer in words, from the table of return conventions."""
    if 'return_logits_and_embeddings' in asked:
        out = '(logits, x)'
    elif 'return_embeddings_and_intermediates' in asked:
        out = '(x, inter)'
    elif 'return_embeddings' in asked or not has_head:
        out = 'x'
    else:
        out = 'logits'
    parts = [out]
    if 'return_next_embed_pred' in asked:
        parts = [f'({out}, (pred, embed))']
    inter = bool(asked & {'return_intermediates', 'return_logit_entropies', 'return_attn_z_loss'})
    if 'return_mems' in asked and not inter:
        return [*parts, 'mems']
    if inter:
        return [*parts, 'inter']
    return [*parts, 'attn'] if 'return_attn' in asked else parts


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return {DIM: 'x', 4: 'x'}.get(value.shape[-1] if value.ndim == 3 else value.shape[-2], 'logits')
    if isinstance(value, tuple):
        if (
            all(isinstance(each, Tensor) for each in value)
            and len({each.shape for each in value}) == 1
            and value[0].shape[-1] != DIM
        ):
            return 'logits'
        if all(isinstance(each, Tensor) and each.shape[-1] == DIM for each in value):
            return '(pred, embed)'
        return f'({", ".join(map(described, value))})'
    return 'inter'


@pytest.mark.parametrize('head', HEADS, ids=str)
@pytest.mark.parametrize(
    'asked', [set(c) for n in (0, 1, 2) for c in itertools.combinations(RETURNS, n)], ids=lambda c: '+'.join(sorted(c))
)
def test_every_combination_of_returns(head: dict[str, Any], asked: set[str], x: Tensor) -> None:
    model = decoder(**head, add_continuous_pred_head=True, max_mem_len=4)
    has_head = 'return_only_embed' not in head
    if not has_head and asked & {'return_logits_and_embeddings', 'return_logit_entropies'}:
        with pytest.raises(ValueError, match='return_only_embed'):
            model(x, **dict.fromkeys(asked, True))
        return
    got = model(x, **dict.fromkeys(asked, True))
    parts = expected(model, asked, None, None, has_head)
    if len(parts) == 2:
        assert isinstance(got, tuple)
        got, second = got
        if parts[1] == 'inter':
            assert second.attn_intermediates[0].values is not None
            assert ('return_logit_entropies' in asked) == (second.logit_entropies is not None)
            assert ('return_attn_z_loss' in asked) == (second.attn_z_loss is not None)
            assert ('return_mems' in asked) == (second.mems is not None)
        elif parts[1] == 'mems':
            assert [mem.shape for mem in second] == [(2, 4, DIM)] * 2
        else:
            assert [attn.shape for attn in second] == [(2, 2, LENGTH, LENGTH)] * 2
    if 'return_embeddings_and_intermediates' in asked and 'return_logits_and_embeddings' not in asked:
        got = got[0] if 'return_next_embed_pred' in asked else got
        assert described(got[0]) == 'x'
        assert got[1].hiddens is not None
    else:
        assert described(got) == parts[0]


def test_next_embedding_needs_its_head(x: Tensor) -> None:
    with pytest.raises(ValueError, match='add_continuous_pred_head'):
        decoder()(x, return_next_embed_pred=True)


def test_z_loss_weight_of_the_constructor_is_the_default(x: Tensor) -> None:
    model = decoder(attn_z_loss_weight=0.5)
    plain = model(x, return_attn_z_loss=True, attn_z_loss_weight=1.0)[1].attn_z_loss
    torch.testing.assert_close(model(x, return_attn_z_loss=True)[1].attn_z_loss, 0.5 * plain)
    torch.testing.assert_close(decoder().flags.attn_z_loss_weight, 1e-4)


def test_logits_of_the_last_positions(x: Tensor) -> None:
    for head in HEADS:
        if 'return_only_embed' in head:
            continue
        model = decoder(**head)
        whole, last = model(x), model(x, logits_last=3)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (whole, last)), strict=True):
            torch.testing.assert_close(a[:, -3:], b)
    with pytest.raises(ValueError, match='logits_last must be a whole number from 1, got 0'):
        model(x, logits_last=0)
    logits, embeds = model(x, logits_last=2, return_logits_and_embeddings=True)
    assert (logits.shape[1], embeds.shape[1]) == (2, LENGTH)
    with pytest.raises(ValueError, match='pooled'):
        encoder(average_pool_embed=True)(x, logits_last=1)


def test_linear_head_gives_the_loss_without_logits(x: Tensor) -> None:
    for options in ({}, {'tie_embedding': True}, {'to_logits': nn.Linear(DIM, TOKENS)}):
        model = decoder(**options)
        assert model.linear_head is not None
        loss = linear_cross_entropy(model(x, return_embeddings=True), *model.linear_head, x, chunk=5)
        torch.testing.assert_close(loss, token_cross_entropy(model(x), x))
    for options in (
        {'mixture_of_softmax': True},
        {'sigsoftmax_logits': True},
        {'num_output_heads': 2},
        {'return_only_embed': True},
    ):
        assert decoder(**options).linear_head is None
    for options in ({'average_pool_embed': True}, {'use_cls_token': True}, {'attn_pool': True}):
        assert encoder(**options).linear_head is None


def test_output_is_log_prob(x: Tensor) -> None:
    model = decoder(mixture_of_softmax=True)
    assert model.output_is_log_prob
    torch.testing.assert_close(model(x).exp().sum(-1), torch.ones(2, LENGTH))


# ---------------------------------------------------------------- pooling, cls, memory tokens, recycling


def test_average_ignores_padding_and_knows_prepended_embeddings(x: Tensor) -> None:
    model = encoder(average_pool_embed=True)
    mask = torch.ones(2, LENGTH).bool()
    mask[1, 7:] = False
    front = torch.randn(2, 2, DIM)
    for given in ({}, {'prepend_embeds': front}):
        cut = {name: value[1:] for name, value in given.items()}
        torch.testing.assert_close(model(x, mask=mask, **given)[1:], model(x[1:, :7], **cut))


@pytest.mark.parametrize('count', [1, 3])
def test_cls_tokens(count: int, x: Tensor) -> None:
    model = encoder(use_cls_token=True, num_cls_tokens=count)
    logits, inter = model(x, return_intermediates=True)
    assert logits.shape == ((2, TOKENS) if count == 1 else (2, count, TOKENS))
    assert inter.last_layer_hiddens.shape == (2, LENGTH, DIM)
    embeds = model.token_emb(x) + model.pos_emb(x)
    out = model.attn_layers(torch.cat((model.cls_token.expand(2, -1, -1), embeds), dim=1))
    torch.testing.assert_close(logits.view(2, count, -1), model.to_logits(out[:, :count]))


def test_attention_pool_in_place_of_logits_and_beside_them(x: Tensor) -> None:
    model = encoder(attn_pool=True, num_pooled_tokens=2, dim_pooled_tokens=10)
    assert model(x).shape == (2, 2, 10)
    pooled, inter = model(x, return_intermediates=True)
    assert inter.logits.shape == (2, LENGTH, TOKENS)
    torch.testing.assert_close(pooled, inter.attn_pooled_tokens)
    causal = decoder(attn_pool=True)
    assert causal(x).shape == (2, LENGTH, TOKENS)
    assert causal(x, return_intermediates=True)[1].attn_pooled_tokens.shape == (2, 1, DIM)


@pytest.mark.parametrize('pool', [{'attn_pool': True}, {'average_pool_embed': True}, {}], ids=str)
@pytest.mark.parametrize('memory', [{'num_memory_tokens': 3}, {}], ids=str)
def test_padding_changes_nothing_with_memory_tokens_pools_and_prefix(
    pool: dict[str, Any], memory: dict[str, Any], x: Tensor
) -> None:
    model = encoder(**pool, **memory)
    mask, front = torch.ones(2, LENGTH).bool(), torch.randn(2, 2, DIM)
    mask[:, 9:] = False
    short = model(x[:, :9], prepend_embeds=front)
    long = model(x, mask=mask, prepend_embeds=front)
    torch.testing.assert_close(long[:, : short.shape[1]], short)


@pytest.mark.parametrize('extra', [{}, {'front': 2}, {'cls': True}], ids=str)
def test_interspersed_memory_tokens(extra: dict[str, Any], x: Tensor) -> None:
    model = decoder(num_memory_tokens=2, memory_tokens_interspersed_every=5)
    front = {'prepend_embeds': torch.randn(2, 2, DIM)} if 'front' in extra else {}
    mask = torch.ones(2, LENGTH).bool()
    mask[:, 9:] = False
    out, inter = model(x, mask=mask, return_intermediates=True, **front)
    rows = LENGTH + (2 if front else 0)
    assert out.shape == (2, rows, TOKENS)
    assert inter.memory_tokens.shape == (2 * -(-rows // 5), 2, DIM)
    torch.testing.assert_close(out[:, : rows - 3], model(x[:, :9], **front))


def test_masks_for_tokens_are_stretched_over_memory_tokens(x: Tensor) -> None:
    model, seen = encoder(num_memory_tokens=2), torch.ones(LENGTH, LENGTH).bool().tril()
    before = model(x, attn_mask=seen)
    other = torch.where(torch.arange(LENGTH) < 6, x, (x + 1) % TOKENS)
    after = model(other, attn_mask=seen)
    # memory tokens see everything, so only a model of one layer is causal; the mask must have been applied all the same
    assert not torch.allclose(before, model(x))
    assert after.shape == before.shape


@pytest.mark.parametrize('extra', [{}, {'num_memory_tokens': 2}, {'use_cls_token': True}], ids=str)
def test_deep_embeddings_with_rows_in_front(extra: dict[str, Any], x: Tensor) -> None:
    model = encoder(ff_deep_embed=True, **extra)
    front = torch.randn(2, 2, DIM)
    before = model(x, prepend_embeds=front)
    with torch.no_grad():
        model.ff_deep_embed[x[0, 0]] += 1.0
    assert not torch.allclose(before[0], model(x, prepend_embeds=front)[0])
    before.sum().backward()
    assert model.ff_deep_embed.grad is not None


def test_recycling_feeds_the_output_back(x: Tensor) -> None:
    model = encoder(recycling=True)
    embeds = model.token_emb(x) + model.pos_emb(x)
    out = model.attn_layers(embeds)
    for _ in range(2):
        out = model.attn_layers(embeds + model.recycled_proj(out))
    torch.testing.assert_close(model(x, recycle_steps=3), model.to_logits(out))
    with pytest.raises(ValueError, match='recycle_steps must be given'):
        model(x)
    assert model.train()(x).shape == (2, LENGTH, TOKENS)
    with pytest.raises(ValueError, match='without recycling'):
        decoder()(x, recycle_steps=2)


def test_rounds_of_recycling_are_drawn_in_training(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def last(low: int, high: int) -> int:
        asked.append((low, high))
        return high

    monkeypatch.setattr('random.randint', last)
    for longest in (1, 3):
        model = encoder(recycling=True, train_max_recycle_steps=longest)
        torch.testing.assert_close(model.train()(x), model(x, recycle_steps=longest))
    assert asked == [(1, 1), (1, 3)]


# ---------------------------------------------------------------- memories


@pytest.mark.parametrize('longest', [0, 3, 40])
def test_memories(longest: int, x: Tensor) -> None:
    model = decoder(max_mem_len=longest)
    _, mems = model(x, return_mems=True)
    _, inter = model(x, return_intermediates=True)
    for mem, hidden in zip(mems, inter.hiddens, strict=True):
        assert torch.equal(mem, hidden[:, LENGTH - min(longest, LENGTH) :])
        assert not mem.requires_grad
    _, more = model(x, mems=mems, return_mems=True)
    assert [mem.shape[1] for mem in more] == [min(longest, 2 * LENGTH)] * 2
    with_mems = model(x, mems=mems)
    assert torch.allclose(with_mems, model(x)) == (longest == 0)


# ---------------------------------------------------------------- cache


CACHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({'rotary_pos_emb': True}, {}),
    ({}, {'scaled_sinu_pos_emb': True}),
    ({'alibi_pos_bias': True}, {'ff_deep_embed': True}),
    ({'rotary_pos_emb': True}, {'emb_dim': 6, 'post_emb_norm': True, 'embed_num_tokens': {'kind': 3}}),
]


@pytest.mark.parametrize(('stack', 'flags'), CACHED, ids=str)
@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('prefix', [0, 3])
@torch.no_grad()
def test_continued_equals_whole(stack: dict[str, Any], flags: dict[str, Any], whole: bool, prefix: int, x: Tensor) -> None:
    model = decoder(stack, **flags)
    more: dict[str, Any] = {}
    kind = torch.randint(0, 3, (2, LENGTH))
    if prefix:
        more['prepend_embeds'] = torch.randn(2, prefix, model.emb_dim)

    def ids(low: int, high: int) -> dict[str, Any]:
        return {'embed_ids': {'kind': kind[:, low:high]}} if 'embed_num_tokens' in flags else {}

    wanted = model(x, **more, **ids(0, LENGTH))[:, prefix:]
    out, cache = model(x[:, :5], return_intermediates=True, **more, **ids(0, 5))
    outs = [out[:, prefix:]]
    assert cache.kv_cache.front == prefix
    for low, high in ((5, 6), (6, 9), (9, LENGTH)):
        low_given = 0 if whole else low
        given = more if whole else {}
        out, cache = model(x[:, low_given:high], cache=cache, return_intermediates=True, **given, **ids(low_given, high))
        assert out.shape[1] == high - low
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), wanted)
    assert cache.cache_length == LENGTH + prefix


@torch.no_grad()
def test_left_padding_leaves_the_conditions_of_memories_where_they_are(x: Tensor) -> None:
    model = decoder({'use_adaptive_rmsnorm': True}, num_memory_tokens=2)
    mems, condition = [torch.randn(2, 3, DIM) for _ in range(2)], torch.randn(2, 3 + 2 + LENGTH, DIM)
    padded = model(x, mems=mems, condition=condition, seq_start_pos=torch.tensor([0, 4]))
    own = torch.cat((condition[1:, :5], condition[1:, 9:]), dim=1)
    torch.testing.assert_close(padded[1:, 4:], model(x[1:, 4:], mems=[mem[1:] for mem in mems], condition=own))
    torch.testing.assert_close(padded[:1], model(x[:1], mems=[mem[:1] for mem in mems], condition=condition[:1]))


@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}, {'alibi_pos_bias': True}], ids=str)
@pytest.mark.parametrize('prefix', [0, 3])
@torch.no_grad()
def test_left_padding_with_a_prefix_and_a_cache_is_as_if_alone(stack: dict[str, Any], prefix: int, x: Tensor) -> None:
    model = decoder(stack)
    start = torch.tensor([0, 4])
    front = {'prepend_embeds': torch.randn(2, prefix, DIM)} if prefix else {}
    alone = model(x[1:, 4:], **{name: value[1:] for name, value in front.items()})[:, prefix:]
    padded = model(x, seq_start_pos=start, **front)[1:, prefix + 4 :]
    torch.testing.assert_close(padded, alone)
    out, cache = model(x[:, :8], seq_start_pos=start, return_intermediates=True, **front)
    outs = [out[1:, prefix + 4 :]]
    for at in range(8, LENGTH):
        out, cache = model(x[:, at : at + 1], seq_start_pos=start, cache=cache, return_intermediates=True)
        outs.append(out[1:])
    torch.testing.assert_close(torch.cat(outs, dim=1), alone)


@torch.no_grad()
def test_all_is_new_if_the_caller_says_so(x: Tensor) -> None:
    model = decoder()
    _, cache = model(x[:, :2], return_intermediates=True)
    out = model(x[:, 2:], cache=cache, input_not_include_cache=True)
    torch.testing.assert_close(out, model(x)[:, 2:])
    told = decoder(input_not_include_cache=True)
    _, cache = told(x[:, :2], return_intermediates=True)
    torch.testing.assert_close(told(x[:, 2:], cache=cache), told(x)[:, 2:])


@torch.no_grad()
def test_mask_of_a_continued_sequence(x: Tensor) -> None:
    model, mask = decoder({'rotary_pos_emb': True}), torch.ones(2, LENGTH).bool()
    mask[1, 3:5] = False
    wanted = model(x, mask=mask)[:, 8:]
    for given in (mask, mask[:, 8:]):
        _, cache = model(x[:, :8], mask=mask[:, :8], return_intermediates=True)
        torch.testing.assert_close(model(x[:, 8:], mask=given, cache=cache), wanted)


@pytest.mark.parametrize('flag', ['num_memory_tokens', 'recycling', 'average_pool_embed'])
def test_models_that_cannot_go_on_from_a_cache_say_so(flag: str, x: Tensor) -> None:
    model = decoder(**{flag: 2 if flag == 'num_memory_tokens' else True})
    assert not model.can_cache_kv
    steps = {'recycle_steps': 1} if flag == 'recycling' else {}
    assert model(x, cache=KVCache(), **steps).isfinite().all()
    _, cache = decoder()(x, return_intermediates=True)
    with pytest.raises(ValueError, match=flag):
        model(x, cache=cache, **steps)


def test_what_a_model_can_cache() -> None:
    assert decoder().can_cache_kv
    assert not decoder().can_cache_kv_outside_max_seq_len
    assert decoder({'rotary_pos_emb': True}).can_cache_kv_outside_max_seq_len
    assert not decoder({'attn_selective': True}).can_cache_kv


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'num_memory_tokns': 2}, 'num_memory_tokens'),
        ({'max_seq_len': 'long'}, 'max_seq_len'),
        ({'use_cls_token': True, 'average_pool_embed': True}, 'Keep one'),
        ({'tie_embedding': True, 'emb_dim': 3}, 'emb_dim'),
        ({'attn_layers': nn.Linear(2, 2)}, 'got Linear'),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        TransformerWrapper(**{'num_tokens': 4, 'max_seq_len': 8, 'attn_layers': Encoder(**STACK), **flags})
    if 'num_memory_tokns' in flags:
        with pytest.raises(UnknownFlag, match='unrecognized kwargs'):
            encoder(**flags)


@pytest.mark.parametrize(
    ('given', 'error', 'says'),
    [
        ({'x': torch.full((2, 3), 0.5)}, TypeError, 'x must be integers'),
        ({'x': torch.full((1, 3), TOKENS)}, IndexError, 'range from 19 to 19'),
        ({'x': torch.zeros(3).long()}, ValueError, 'batch of sequences'),
        ({'x': torch.zeros(1, 33).long()}, ValueError, 'at most max_seq_len=32 tokens'),
        ({'mask': torch.ones(2, 3)}, TypeError, 'boolean'),
        ({'mask': torch.ones(2, 3).bool()}, ValueError, r'\(2, 12\)'),
        ({'pos': torch.arange(3)}, ValueError, 'pos must have one entry'),
        ({'embed_ids': {'kind': torch.zeros(2, 12).long()}}, ValueError, 'unknown: kind'),
        ({'sum_embeds': torch.zeros(2, 3, DIM)}, ValueError, 'sum_embeds'),
        ({'prepend_embeds': torch.zeros(2, 3, 5)}, ValueError, 'prepend_embeds'),
        ({'prepend_embeds': torch.zeros(2, 3, DIM), 'prepend_mask': torch.ones(2, 3)}, TypeError, 'prepend_mask'),
        ({'context': torch.zeros(2, 3, DIM)}, (ValueError, TypeError), 'context'),
        ({'mems': [torch.zeros(2, 3, DIM)]}, ValueError, 'mems'),
    ],
)
def test_arguments_that_cannot_be(given: dict[str, Any], error: type[Exception], says: str, x: Tensor) -> None:
    with pytest.raises(error, match=says):
        decoder()(**{'x': x, **given})


def test_left_padding_between_windows_is_refused(x: Tensor) -> None:
    model = decoder(num_memory_tokens=1, memory_tokens_interspersed_every=4)
    with pytest.raises(ValueError, match='one by one'):
        model(x, seq_start_pos=torch.tensor([0, 1]))


def test_decoding_past_the_position_table_is_refused() -> None:
    model, x = decoder(max_seq_len=4), torch.zeros(1, 4).long()
    _, cache = model(x, return_intermediates=True)
    with pytest.raises(ValueError, match=r'at most max_seq_len=4 tokens.* got 5'):
        model(x[:, :1], cache=cache)


# ---------------------------------------------------------------- the model as an object


def test_parameters_have_the_expected_names() -> None:
    options = {
        'emb_dim': 6,
        'embed_num_tokens': {'kind': 3},
        'post_emb_norm': True,
        'num_memory_tokens': 2,
        'use_cls_token': True,
        'ff_deep_embed': True,
        'mixture_of_softmax': True,
        'add_continuous_pred_head': True,
    }
    names = [name for name in encoder(**options).state_dict() if not name.startswith('attn_layers.')]
    assert names == [
        'ff_deep_embed',
        'cls_token',
        'memory_tokens',
        'token_emb.emb.weight',
        'pos_emb.emb.weight',
        'embeds.kind_embed.weight',
        'post_emb_norm.gamma',
        'project_emb.weight',
        'project_emb.bias',
        'to_mixture.0.weight',
        'combine_mixture.weight',
        'to_logits.weight',
        'to_next_embed_pred.0.weight',
        'to_next_embed_pred.2.weight',
    ]


def test_copies_and_files_give_the_same(x: Tensor) -> None:
    model = decoder(tie_embedding=True, num_memory_tokens=2)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        twin.token_emb.emb.weight += 1
    assert not torch.allclose(twin(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x))


def test_parameters_for_muon_and_clipping(x: Tensor) -> None:
    model = decoder()
    matrices = {id(p) for p in model.muon_parameters()}
    assert matrices
    assert matrices < {id(p) for p in model.attn_layers.parameters()}
    _, inter = model(x, return_intermediates=True)
    before = model.attn_layers.layers[0][1].to_q.weight.clone()
    model.attn_qk_clip_(inter, tau=1e-3)
    assert not torch.equal(before, model.attn_layers.layers[0][1].to_q.weight)


def test_prefix_and_custom_stacks(x: Tensor) -> None:
    class Mine(Decoder):
        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            return super().forward(x * 2, **kwargs)

    model = build(Mine(**STACK))
    plain = build(Decoder(**STACK))
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), plain(x))
    prefix = build(PrefixDecoder(**STACK))
    assert prefix(x, prefix_attn_len=3).shape == (2, LENGTH, TOKENS)


@pytest.mark.parametrize('flags', [{}, {'num_memory_tokens': 2}, {'attn_pool': True}], ids=str)
def test_one_graph_when_compiled(flags: dict[str, Any], x: Tensor) -> None:
    model, mask = encoder(**flags), torch.ones(2, LENGTH).bool()
    mask[1, 5:] = False
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x, mask=mask), model(x, mask=mask))


def test_a_mask_of_what_is_prepended_may_be_the_same_for_all_rows() -> None:
    torch.manual_seed(0)
    model = TransformerWrapper(
        num_tokens=8, max_seq_len=16, attn_layers=Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    ).eval()
    x, embeds, shown = torch.randint(8, (2, 5)), torch.randn(2, 2, 16), torch.tensor([[False, True]])
    one = model(x, prepend_embeds=embeds, prepend_mask=shown)
    torch.testing.assert_close(one, model(x, prepend_embeds=embeds, prepend_mask=shown.expand(2, -1)))
