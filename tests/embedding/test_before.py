"""What embeddings take from the token before, as a loop, behind caches, windows and padding."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import shaken
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError

STACK = {'dim': 8, 'depth': 1, 'heads': 2, 'attn_dim_head': 4, 'verbose': False, 'rotary_pos_emb': True}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def made(kind=Decoder, **flags):
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=kind(**STACK), **flags)
    return shaken(net, 0).double().eval()


def entering(net, *args, **kwargs):
    """The embeddings that enter the stack."""
    return net(*args, return_intermediates=True, **kwargs)[1].initial_embeds


@pytest.mark.parametrize('kind', [Decoder, Encoder])
def test_smear_adds_a_gated_part_of_the_token_before(kind):
    net = made(kind, smear=True)
    plain, got = net.token_emb(IDS), entering(net, IDS)
    for row in range(2):
        for token in range(6):
            x = plain[row, token]
            gate = (net.smear.to_gate.weight[0] @ x).sigmoid()
            want = x + (net.smear.scale * gate * plain[row, token - 1] if token else 0)
            assert torch.allclose(got[row, token], want)


def test_smear_starts_silent():
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=Decoder(**STACK), smear=True)
    assert torch.equal(entering(net, IDS), net.token_emb(IDS))


def test_a_pair_of_tokens_has_a_row_found_by_a_hash():
    net = made(bigram_hash_embed=17)
    plain, got = net.token_emb(IDS), entering(net, IDS)
    used = set()
    for row in range(2):
        for token in range(6):
            own, before = int(IDS[row, token]), int(IDS[row, token - 1]) + 1
            place = ((own * 0x9E3779B1) ^ (before * 0x85EBCA77)) % 16 if token else 16
            used.add(place)
            assert torch.allclose(got[row, token], plain[row, token] + net.bigram.table.weight[place])
    assert len(used) > 6


def test_bigrams_start_silent_and_pairs_are_spread():
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=Decoder(**STACK), bigram_hash_embed=1001)
    assert torch.equal(entering(net, IDS), net.token_emb(IDS))
    ids = torch.arange(200)
    pairs = net.bigram.rows(ids.repeat_interleave(200)[None], (ids.repeat(200) + 1)[None]).flatten()
    # as evenly as by chance: 40,000 pairs on 1,000 rows
    counts = torch.bincount(pairs, minlength=1000)
    assert counts.max() < 80
    assert counts[:1000].min() > 8


def test_bigrams_are_refused_beside_an_embedding_of_ones_own():
    with pytest.raises(FlagError, match='pairs are made of token ids'):
        made(bigram_hash_embed=8, token_emb=torch.nn.Embedding(11, 8))


LOOKING_BACK = [{'smear': True}, {'bigram_hash_embed': 17}, {'smear': True, 'bigram_hash_embed': 17}]


@pytest.mark.parametrize('flags', LOOKING_BACK, ids=str)
def test_padding_is_no_token_before(flags):
    net = made(**flags)
    whole = entering(net, IDS)
    left = entering(net, torch.cat((IDS[:, :2] * 0 + 7, IDS), dim=1), seq_start_pos=torch.tensor([2, 2]))
    assert torch.allclose(left[:, 2:], whole)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 2] = False
    hidden = entering(net, IDS, mask=mask)
    assert torch.allclose(hidden[:, 3], entering(net, IDS[:, 3:])[:, 0])
    assert not torch.allclose(hidden[:, 3], whole[:, 3])


@pytest.mark.parametrize('flags', LOOKING_BACK, ids=str)
def test_chunks_of_a_prompt_and_windows_and_rows_in_front(flags):
    net = made(**flags)
    front = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, _ = net(IDS, prepend_embeds=front, return_intermediates=True)
    out, cache = net(IDS[:, :1], prepend_embeds=front, return_intermediates=True)
    got = [out]
    for start, stop in ((1, 3), (3, 4), (4, 6)):
        new = IDS[:, start:stop]
        out, cache = net(new, prepend_embeds=front, cache=cache, input_not_include_cache=True, return_intermediates=True)
        got.append(out)
    assert torch.allclose(torch.cat(got, dim=1), whole)
    held = cache.kv_cache
    assert {tape.length for layer in held for tape in layer.tapes.values()} == {9}
    narrow = held.window(2)
    assert torch.equal(entering(net, IDS[:, 1:2], cache=narrow), entering(net, IDS[:, 1:2], cache=held))


@pytest.mark.parametrize('flags', LOOKING_BACK, ids=str)
def test_a_cache_without_the_token_before_is_refused(flags):
    _, cache = made()(IDS, return_intermediates=True)
    with pytest.raises(ValueError, match='looks back at'):
        made(**flags)(IDS[:, :1], cache=cache)


@pytest.mark.parametrize('flags', LOOKING_BACK, ids=str)
@pytest.mark.parametrize('how', [{}, {'prompt_lookup': 2}, {'beams': 2}])
def test_texts_are_written_as_without_a_cache(flags, how):
    model = AutoregressiveWrapper(made(**flags))
    if 'beams' in how:
        with_it, without = (model.beam_search(IDS, 5, cache_kv=cached, **how) for cached in (True, False))
    else:
        with_it = model.generate(IDS[:1], 5, temperature=0.0, **how)
        without = model.generate(IDS[:1], 5, temperature=0.0, cache_kv=False)
    assert torch.equal(with_it, without)
