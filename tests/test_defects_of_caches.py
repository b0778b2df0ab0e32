"""Defects of caches and generation that were found and mended: what was wrong, as a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, PrefixDecoder, TransformerWrapper
from x_transformers.attention.inputs import Intermediates
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.generation.prompts import GenerateError


def model(kind: Any = Decoder, wrapper: dict[str, Any] | None = None, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    stack = kind(**{'dim': 16, 'depth': 2, 'heads': 2, 'verbose': False} | flags)
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
    with pytest.raises(GenerateError, match=f'{name} covers 5 tokens, but 10 will be fed'):
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
