"""Defects of caches and generation that were found and mended: what was wrong, as a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import Around
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, PrefixDecoder, TransformerWrapper
from x_transformers.attention.inputs import Intermediates
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.free_transformer import FreeTransformer
from x_transformers.generation.continuation import Continuation
from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.prompts import GenerateError


def model(kind: Any = Decoder, wrapper: dict[str, Any] | None = None, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    flags = {'dim': 16, 'heads': 2, 'verbose': False} | ({} if 'custom_layers' in flags else {'depth': 2}) | flags
    stack = kind(**flags)
    return TransformerWrapper(num_tokens=24, **{'max_seq_len': 64} | (wrapper or {}), attn_layers=stack).eval()


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(0, 24, (rows, length), generator=torch.Generator().manual_seed(1))


class LoRA(nn.Module):
    """An adapter that shows the weight and the bias of the layer that it adapts."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.a = base, nn.Parameter(torch.randn(base.out_features, base.in_features))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t()


@pytest.mark.parametrize('rows', [1, 6, 8])
def test_an_adapter_in_a_feed_forward_is_called_while_decoding(rows: int) -> None:
    net: Any = model(ff_glu=True, rotary_pos_emb=True)
    for layer in net.attn_layers.layers[1::2]:
        layer[1].ff[0].proj = LoRA(layer[1].ff[0].proj)
    made = AutoregressiveWrapper(net)
    cached, full = (made.generate(prompts(rows, 5), 12, temperature=0.0, cache_kv=cache) for cache in (True, False))
    assert torch.equal(cached, full)


@pytest.mark.parametrize('flags', [{'rotary_pos_emb': True}, {'rotary_pos_emb': True, 'attn_num_mem_kv': 2}], ids=str)
def test_a_cache_remembers_the_offset_of_positions(flags: dict[str, Any]) -> None:
    net, x = model(**flags), prompts(2, 9)
    full = net(x, seq_pos_offset=30)
    cache = net(x[:, :5], seq_pos_offset=30, return_intermediates=True)[1]
    new: dict[str, Any] = {'return_intermediates': True, 'input_not_include_cache': True}
    again, _ = net(x[:, 5:7], cache=cache, seq_pos_offset=30, **new)
    out, cache = net(x[:, 5:7], cache=cache, **new)
    torch.testing.assert_close(out, full[:, 5:7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(net(x, cache=cache)[:, -2:], full[:, 7:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['attn_bias', 'self_attn_kv_residuals'])
@pytest.mark.parametrize('layers', [False, True])
def test_keywords_of_generate_that_cover_all_tokens(name: str, layers: bool) -> None:
    shape = (10, 10) if name == 'attn_bias' else (3, 10, 16)
    shape = (2, *shape) if layers else shape
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = AutoregressiveWrapper(model())
    cached, full = (made.generate(prompts(3, 5), 6, temperature=0.0, cache_kv=c, **{name: value}) for c in (True, False))
    assert torch.equal(cached, full)
    assert not torch.equal(full, made.generate(prompts(3, 5), 6, temperature=0.0))
    short = value[..., :5, :5] if name == 'attn_bias' else value[..., :5, :]
    with pytest.raises(GenerateError, match=f'{name} must cover the 10 tokens that will be fed to the net, got 5'):
        made.generate(prompts(3, 5), 6, **{name: short})


def test_beams_permute_the_residuals_of_a_context_by_rows() -> None:
    """As many layers as rows: the axis of the layers must not be taken for that of the batch."""
    made = AutoregressiveWrapper(model(cross_attend=True, depth=3))
    context, shifts = torch.randn(3, 4, 16), torch.randn(3, 3, 4, 16)
    together = made.beam_search(prompts(3, 5), 4, beams=2, context=context, cross_attn_kv_residuals=shifts)
    for row in range(3):
        given = {'context': context[row : row + 1], 'cross_attn_kv_residuals': shifts[:, row : row + 1]}
        assert torch.equal(made.beam_search(prompts(3, 5)[row : row + 1], 4, beams=2, **given)[0], together[row])


def test_a_draft_model_that_is_too_short_is_refused_before_anything_is_read() -> None:
    made, small = (AutoregressiveWrapper(model(wrapper={'max_seq_len': n}, rotary_pos_emb=n > 12)) for n in (64, 12))
    with pytest.raises(GenerateError, match='the draft model'):
        made.generate(prompts(1, 8), 20, draft_model=small)


def test_padding_on_the_left_does_not_move_tokens_away_from_memories() -> None:
    for flags in ({'rotary_pos_emb': True}, {'alibi_pos_bias': True}, {'polar_pos_emb': True}):
        net, x = model(**flags, wrapper={'max_mem_len': 4}), prompts(1, 5)
        mems, padded = [torch.randn(1, 4, 16)] * 2, torch.cat((torch.zeros(1, 3).long(), x), 1)
        out = net(padded, mems=mems, seq_start_pos=torch.tensor([3]))[:, 3:]
        torch.testing.assert_close(out, net(x, mems=mems), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('wrapper', [{}, {'num_memory_tokens': 2}], ids=str)
@pytest.mark.parametrize('prepended', [False, True])
def test_a_prefix_counts_tokens_whatever_stands_in_front(wrapper: dict[str, Any], prepended: bool) -> None:
    net, x = model(PrefixDecoder, wrapper, rotary_pos_emb=True), prompts(1, 8)
    given = {'prefix_attn_len': 3} | ({'prepend_embeds': torch.randn(1, 2, 16)} if prepended else {})
    for changed, seen in ((2, True), (3, False)):
        y = x.clone()
        y[0, changed] = (y[0, changed] + 1) % 24
        first = [net(t, **given)[0, -8] for t in (x, y)]
        assert torch.equal(*first) != seen


def test_a_prefix_counts_tokens_behind_padding() -> None:
    net, x = model(PrefixDecoder, rotary_pos_emb=True), prompts(1, 8)
    padded = torch.cat((torch.zeros(1, 2).long(), x), 1)
    out = net(padded, seq_start_pos=torch.tensor([2]), prefix_attn_len=3)[:, 2:]
    torch.testing.assert_close(out, net(x, prefix_attn_len=3), atol=1e-5, rtol=1e-5)


def test_masked_tokens_that_are_appended_are_as_in_the_whole_sequence() -> None:
    net, x = model(), prompts(1, 8)
    mask = torch.tensor([[True] * 3 + [False] * 2 + [True] * 3])
    full, cache, parts = net(x, mask=mask), None, []
    for start, stop in ((0, 3), (3, 5), (5, 8)):
        given = {'mask': mask[:, start:stop], 'cache': cache, 'input_not_include_cache': True}
        out, cache = net(x[:, start:stop], return_intermediates=True, **given)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)


def by_hand(net: nn.Module, x: Tensor) -> LayerIntermediates:
    """A cache put together of ``cached_kv``, as it may have been stored."""
    record = net(x, return_intermediates=True)[1]
    held = [Intermediates(cached_kv=each.cached_kv, layer_type='a') for each in record.attn_intermediates]
    return LayerIntermediates(attn_intermediates=held, cache_length=x.shape[1])


@pytest.mark.parametrize(
    'flags',
    [
        {'rotary_pos_emb': True},
        {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 6},
        {
            'attn_use_latent_kv': True,
            'attn_dim_latent_kv': 6,
            'attn_latent_rope_subheads': 1,
            'rotary_pos_emb': True,
        },
    ],
    ids=str,
)
def test_a_cache_put_together_by_hand(flags: dict[str, Any]) -> None:
    net, x = model(**flags), prompts(1, 7)
    torch.testing.assert_close(net(x, cache=by_hand(net, x[:, :6])), net(x)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('per_row', [False, True])
def test_a_cache_by_hand_lacks_forget_gates(per_row: bool) -> None:
    net, x = model(attn_data_dependent_alibi=True, attn_data_dependent_alibi_per_row=per_row), prompts(1, 7)
    with pytest.raises(ValueError, match='must hold the forget gates'):
        net(x, cache=by_hand(net, x[:, :6]))


def test_a_cache_by_hand_lacks_shifted_tokens() -> None:
    net, x = model(shift_tokens=1), prompts(1, 7)
    with pytest.raises(ValueError, match='must hold the tokens that shift_tokens shifts'):
        net(x, cache=by_hand(net, x[:, :6]))


@pytest.mark.parametrize('learned', [False, True])
def test_a_cache_by_hand_lacks_sums_over_tokens(learned: bool) -> None:
    net, x = model(mv_split_residual=True, residual_fn_kwargs={'learned': learned}), prompts(1, 7)
    with pytest.raises(ValueError, match='must hold the sums over earlier tokens'):
        net(x, cache=by_hand(net, x[:, :6]))


@pytest.mark.parametrize('mixer', ['gated_delta_rule', 'gated_linear_attention'])
def test_a_cache_by_hand_lacks_the_states_of_mixers(mixer: str) -> None:
    net, x = model(mixer=mixer, custom_layers=('m', 'f', 'a', 'f')), prompts(1, 7)
    with pytest.raises(ValueError, match='must hold the states of mixers'):
        net(x, cache=by_hand(net, x[:, :6]))


def test_a_cache_of_keys_and_values_lacks_latents() -> None:
    net, x = model(attn_use_latent_kv=True, attn_dim_latent_kv=6), prompts(1, 7)
    with pytest.raises(ValueError, match='must hold the latents of keys and values'):
        net(x, cache=model()(x[:, :6], return_intermediates=True)[1])


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'attn_composable': True}, 'what keys say of compositions'),
        ({'attn_path': True}, 'the steps of accumulated positions'),
    ],
    ids=str,
)
def test_a_cache_by_hand_lacks_what_attention_remembers_beside_keys(flags: dict[str, Any], says: str) -> None:
    net, x = model(**flags), prompts(1, 7)
    with pytest.raises(ValueError, match=f'must hold {says}'):
        net(x, cache=by_hand(net, x[:, :6]))


@pytest.mark.parametrize(
    'flags',
    [
        {'rotary_pos_emb': True},
        {'rotary_pos_emb': True, 'shift_tokens': 1},
        {'rotary_pos_emb': True, 'attn_num_mem_kv': 2},
        {'attn_data_dependent_alibi': True},
    ],
    ids=str,
)
def test_nets_around_ours_decode_as_ours(flags: dict[str, Any]) -> None:
    net = model(wrapper={'max_seq_len': 8, 'use_abs_pos_emb': False}, **flags)
    own, around = AutoregressiveWrapper(net), AutoregressiveWrapper(Around(net))
    for given in ({}, {'prompt_lens': [5, 2] * 2}):
        found = [made.generate(prompts(4, 5), 14, temperature=0.0, **given) for made in (own, around)]
        assert torch.equal(*found)
    found = [made.beam_search(prompts(2, 5), 12, beams=3) for made in (own, around)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    'flags', [{}, {'attn_hybrid_module': nn.GRU(16, 16, batch_first=True)}, {'shift_tokens': 1}], ids=['plain', 'gru', 'shift']
)
def test_what_a_mask_hides_is_not_read_beside_attention(flags: dict[str, Any]) -> None:
    net, x = model(attn_dim_head=8, **flags), prompts(1, 8)
    mask = torch.tensor([[True] * 3 + [False] * 2 + [True] * 3])
    y = torch.where(mask, x, (x + 7) % 24)
    full, cache, parts = net(x, mask=mask), None, []
    torch.testing.assert_close(full[:, 5:], net(y, mask=mask)[:, 5:])
    for start, stop in ((0, 3), (3, 5), (5, 8)):
        given = {'mask': mask[:, start:stop], 'cache': cache, 'input_not_include_cache': True}
        out, cache = net(x[:, start:stop], return_intermediates=True, **given)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)


def test_a_hybrid_that_reads_both_ways_does_not_read_padding() -> None:
    class BothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(16, 8, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Any:
            return self.gru(x)[0]

    net, x = model(Encoder, attn_dim_head=8, attn_hybrid_module=BothWays()), prompts(1, 8)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    y = torch.where(mask, x, (x + 7) % 24)
    torch.testing.assert_close(net(x, mask=mask)[:, :5], net(y, mask=mask)[:, :5])


UNTURNED = [
    {'rotary_pos_emb': True},
    {'rotary_xpos': True},
    {'polar_pos_emb': True},
    {'rotary_pos_emb': True, 'attn_use_latent_kv': True, 'attn_dim_latent_kv': 6},
    {
        'rotary_pos_emb': True,
        'attn_use_latent_kv': True,
        'attn_dim_latent_kv': 6,
        'attn_latent_rope_subheads': 1,
    },
    {'rotary_scaling': {'type': 'dynamic', 'factor': 2.0, 'original_length': 4}, 'rotary_pos_emb': True},
]


def against_the_window(net: TransformerWrapper, ids: Tensor, start: Tensor | None = None) -> float:
    """How far cached reading beyond the window is from reading the window anew, one layer deep."""
    begin, length, most = 5, net.max_seq_len, 0.0
    pads = 0 if start is None else int(start.max())
    reader, tokens = Reader(net, start=start, most_pads=pads), Tokens(ids[:, :begin], 30)
    with torch.no_grad():
        for end in range(begin, ids.shape[1]):
            got = reader.read(tokens)[:, -1]
            tokens.append(ids[:, end])
            low = max(0, end - length)
            given = {} if start is None else {'seq_start_pos': (start - low).clamp(min=0)}
            most = max(most, (net(ids[:, low:end], **given)[:, -1] - got).abs().max().item())
    return most


@pytest.mark.parametrize('flags', UNTURNED, ids=str)
@pytest.mark.parametrize('padded', [False, True])
def test_beyond_the_window_places_count_from_its_beginning(flags: dict[str, Any], padded: bool) -> None:
    """Learned keys have no place, so they notice where places are counted from."""
    net = model(wrapper={'max_seq_len': 7}, depth=1, attn_num_mem_kv=2, **flags)
    assert against_the_window(net, prompts(2, 24), torch.tensor([0, 3]) if padded else None) < 1e-5


def test_contextual_positions_count_from_the_beginning_of_the_window() -> None:
    net = model(wrapper={'max_seq_len': 7}, depth=1, attn_use_cope=True, attn_cope_max_pos=4, rotary_pos_emb=True)
    assert against_the_window(net, prompts(2, 24)) < 1e-5


def test_a_program_counts_places_from_the_beginning_of_the_window() -> None:
    net = model(wrapper={'max_seq_len': 7}, depth=1, attn_num_mem_kv=2, rotary_pos_emb=True)
    ids = prompts(2, 24)
    cache = net(ids[:, :5], return_intermediates=True)[1]
    program = Continuation(net, cache, capacity=24, reach=7)
    for end in range(5, 24):
        out = program.read(ids[:, end : end + 1])[:, -1]
        whole = net(ids[:, max(0, end - 6) : end + 1])[:, -1]
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('mems', [False, True])
def test_layers_without_a_latent_beside_others_with_one_in_memory_of_fixed_shape(mems: bool) -> None:
    """Their keys are kept turned, and the newest is not the last row of what there is room for."""
    flags = {'rotary_pos_emb': True, 'attn_use_latent_kv': (True, False), 'attn_dim_latent_kv': (6, None)}
    net, x = model(wrapper={'max_mem_len': 4}, **flags), prompts(2, 9)
    given = {'mems': [torch.randn(2, 4, 16)] * 2} if mems else {}
    full, cache = net(x, **given), net(x[:, :4], return_intermediates=True, **given)[1]
    program = Continuation(net, cache, capacity=14)
    for start, stop in ((4, 5), (5, 7), (7, 9)):
        out = program.read(x[:, start:stop], **given)
        torch.testing.assert_close(out, full[:, start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('cached', [True, False])
def test_a_text_may_begin_behind_nothing_but_embeddings(cached: bool) -> None:
    net, front = model(rotary_pos_emb=True), torch.randn(2, 3, 16)
    made = AutoregressiveWrapper(net).generate(prompts(2, 0), 4, temperature=0.0, prepend_embeds=front, cache_kv=cached)
    whole = net(made[:, :-1], prepend_embeds=front).argmax(-1)[:, 2:]
    assert torch.equal(made, whole)


def test_a_free_transformer_that_cannot_be_cached_reads_all_tokens_again() -> None:
    torch.manual_seed(0)
    given: dict[str, Any] = {'dim': 16, 'heads': 2, 'max_seq_len': 16, 'latent_bits': 2}
    made = FreeTransformer(
        num_tokens=9, dec_head_depth=1, dec_tail_depth=1, dec_kwargs={'attn_selective': True}, verbose=False, **given
    )
    prompt = torch.ones(1, 3).long()
    cached, full = (made.generate(prompt, 8, temperature=0.0, use_kv_cache=cache) for cache in (True, False))
    assert torch.equal(cached, full)
    assert cached.shape == (1, 8)
