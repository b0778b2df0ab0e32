from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper
from x_transformers.cache.intermediates import LayerIntermediates, get_cached_kvs, self_attention_kvs
from x_transformers.cache.kv_cache import KVCache


def rows(n: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, n, 4)


def filled(n: int = 5, batch: int = 2) -> KVCache:
    cache = KVCache()
    for step in (0, 2):
        cache.step(step).extend(k=rows(n, batch), v=rows(n, batch))
    cache.step(1).fixed('k', rows(3, batch))
    cache.advance(n)
    return cache


@pytest.mark.parametrize('seed', range(40))
def test_random_histories(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        cache = filled()
        context = cache.step(1).get('k')
        expected = cache.step(0).get('k').clone()
        snapshots = []
        for _ in range(25):
            snapshots.append((cache, expected.clone(), context.clone(), cache.length))
            move = rng.choice(['extend', 'extend', 'rollback', 'window', 'reorder', 'branch'])
            if move == 'extend':
                new = rows(rng.choice([1, 1, 4]), expected.shape[0])
                cache = cache.fork()
                for step in (0, 2):
                    cache.step(step).extend(k=new, v=new)
                cache.advance(new.shape[-2])
                expected = torch.cat((expected, new), dim=-2)
            elif move == 'rollback':
                gone = rng.randint(0, cache.retained)
                cache = cache.rollback(cache.length - gone)
                expected = expected[..., : expected.shape[-2] - gone, :]
            elif move == 'window':
                n = rng.randint(0, 8)
                cache = cache.window(n)
                expected = expected[..., max(expected.shape[-2] - n, 0) :, :]
            elif move == 'reorder':
                index = torch.tensor([rng.randrange(expected.shape[0]) for _ in range(rng.randint(1, 3))])
                cache, expected, context = cache.reorder(index), expected[index], context[index]
            else:
                cache, expected, context, _ = rng.choice(snapshots)
        for cache, expected, context, length in snapshots:
            assert cache.length == length
            assert cache.retained == expected.shape[-2]
            assert torch.equal(cache.step(0).get('k'), expected)
            assert torch.equal(cache.step(1).get('k'), context)
            assert cache.step(0).length == cache.step(2).length


def test_extend_returns_the_whole_in_the_order_given() -> None:
    cache = KVCache().step(0)
    k, v = rows(2), rows(2)
    assert all(a is b for a, b in zip(cache.extend(v=v, k=k), (v, k), strict=True))
    full_k, full_v = cache.extend(k=rows(1), v=rows(3))
    assert (full_k.shape[-2], full_v.shape[-2]) == (3, 5)
    assert cache.get('nothing') is None


def test_a_fork_is_a_snapshot() -> None:
    layer = filled().step(0)
    twin = layer.fork()
    layer.extend(k=rows(1))
    layer.keep('state', torch.zeros(2))
    layer.carry['h'] = 1
    assert (twin.length, layer.length) == (5, 6)
    assert twin.get('state') is None
    assert twin.carry == {}


def test_states_are_reordered_and_refuse_rollback() -> None:
    cache = filled()
    cache.step(0).keep('last', torch.tensor([[1.0], [2.0]]))
    swapped = cache.reorder(torch.tensor([1, 0]))
    assert swapped.step(0).get('last').flatten().tolist() == [2.0, 1.0]
    assert not cache.can_rollback
    with pytest.raises(ValueError, match='last'):
        cache.rollback(4)
    assert cache.rollback(5).length == 5


@pytest.mark.parametrize('batch', [1, 2, 3])
def test_recurrent_carry_is_reordered_along_its_batch(batch: int) -> None:
    cache = filled(batch=batch)
    hidden = torch.randn(1, batch, 4)
    cache.step(0).carry['hybrid'] = (hidden, {'c': hidden + 1, 'n': 3})
    index = torch.tensor([batch - 1, 0, 0])
    moved, other = cache.reorder(index).step(0).carry['hybrid']
    assert torch.equal(moved, hidden[:, index])
    assert torch.equal(other['c'], hidden[:, index] + 1)
    assert other['n'] == 3


def test_the_batch_axis_of_a_carry_can_be_told() -> None:
    cache = filled(batch=1)
    cache.step(0).carry['hybrid'] = torch.randn(1, 1, 4)
    cache.step(0).carry_axis['hybrid'] = 0
    assert cache.reorder(torch.tensor([0, 0])).step(0).carry['hybrid'].shape == (2, 1, 4)


def test_rollback_says_what_is_held() -> None:
    cache = filled().window(2)
    assert (cache.length, cache.retained) == (5, 2)
    assert cache.rollback(3).retained == 0
    with pytest.raises(ValueError, match='newest 2 of 5 rows'):
        cache.rollback(2)
    with pytest.raises(ValueError, match='got 6'):
        cache.rollback(6)


def test_front_travels_with_every_operation() -> None:
    cache = filled()
    cache.front = 3
    for made in (cache.fork(), cache.rollback(4), cache.window(2), cache.reorder(torch.tensor([0])), cache.reserve(4)):
        assert made.front == 3


def test_bytes_count_what_is_held() -> None:
    cache = filled()
    assert cache.bytes() == 4 * (4 * 2 * 5 * 4 + 2 * 3 * 4)
    with torch.no_grad():
        cache.step(0).extend(k=rows(1))
    assert cache.bytes() == 4 * (4 * 2 * 5 * 4 + 2 * 3 * 4 + 2 * 4)


def test_of_takes_caches_and_intermediates() -> None:
    cache = filled()
    assert KVCache.of(None) is None
    assert KVCache.of(cache) is cache
    assert KVCache.of(LayerIntermediates(kv_cache=cache)) is cache
    with pytest.raises(TypeError, match='list'):
        KVCache.of([1])


def test_of_builds_tapes_from_intermediates_made_by_hand() -> None:
    k, v = rows(3), rows(3)
    made = LayerIntermediates(
        attn_intermediates=[
            SimpleNamespace(cached_kv=(k, v), layer_type='a'),
            SimpleNamespace(cached_kv=(rows(7), rows(7)), layer_type='c'),
            SimpleNamespace(cached_kv=None, layer_type='a'),
        ],
        cache_length=3,
    )
    cache = KVCache.of(made, steps=(0, 1, 3))
    assert cache.length == cache.retained == 3
    assert cache.step(0).get('k') is k
    assert cache.step(1).tapes['v'].fixed
    assert get_cached_kvs(made)[2] is None
    assert len(self_attention_kvs(made)) == 1


def test_initial_embed_has_two_names() -> None:
    made = LayerIntermediates()
    assert made.initial_embed is None
    made.initial_embed = torch.ones(1)
    assert made.initial_embeds is made.initial_embed
    assert made.cache_length == 0


def test_caches_survive_pickling() -> None:
    cache = pickle.loads(pickle.dumps(filled()))
    assert cache.retained == 5


def test_beams_of_one_prompt_need_not_gather_their_context() -> None:
    cache = filled()
    context = cache.step(1).tapes['k']
    index = torch.tensor([1, 1])
    moved = cache.reorder(index, context=False)
    assert moved.step(1).tapes['k'] is context
    assert torch.equal(moved.step(0).get('k'), cache.step(0).get('k')[index])


def test_a_carried_function_does_not_forbid_rollback() -> None:
    cache = filled()
    cache.step(0).carry['unrotate'] = len
    assert cache.rollback(3).step(0).carry['unrotate'] is len
    cache.step(0).carry['hidden'] = {'h': torch.zeros(1, 2, 3)}
    with pytest.raises(ValueError, match='hidden'):
        cache.rollback(2)


@torch.no_grad()
def test_layers_share_one_tape_of_angles_whatever_happens_to_the_cache() -> None:
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=9, max_seq_len=0, attn_layers=Decoder(dim=32, depth=3, heads=2, rotary_pos_emb=True))
    net = net.eval()
    x = torch.randint(0, 9, (2, 12))
    _, seen = net(x[:, :6], return_intermediates='cache')

    def shared(cache: KVCache) -> bool:
        tapes = [layer.tapes['angles'] for layer in cache if 'angles' in layer.tapes]
        return len(tapes) == 3 and len({id(tape) for tape in tapes}) == 1

    whole = net(x)
    cache = seen.kv_cache
    rows = torch.tensor([1, 0])
    for changed in (cache, cache.reserve(9), cache.rollback(5), cache.window(4), cache.reorder(rows), cache.fixed(16)):
        assert shared(changed)
    # two that go on from one do not write over each other's angles
    for begin in (cache.reserve(9), cache.rollback(5).rollback(4)):
        held = begin.length
        for _ in range(2):
            out, again = net(x[:, held:], cache=begin, input_not_include_cache=True, return_intermediates='cache')
            torch.testing.assert_close(out, whole[:, held:])
            assert shared(again.kv_cache)
    once = cache.steps[0].tapes['angles'].nbytes()
    assert cache.bytes() == once + sum(cache.steps[i].tapes[n].nbytes() for i in (0, 2, 4) for n in 'kv')


@torch.no_grad()
def test_whoever_asks_for_the_cache_alone_is_given_no_hidden_states() -> None:
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(dim=32, depth=2, heads=2)).eval()
    x = torch.randint(0, 9, (2, 8))
    whole, everything = net(x, return_intermediates=True)
    logits, seen = net(x[:, :5], return_intermediates='cache')
    torch.testing.assert_close(logits, whole[:, :5])
    assert not seen.hiddens
    assert not seen.layer_hiddens
    assert not seen.attn_intermediates
    assert everything.hiddens
    assert everything.attn_intermediates
    torch.testing.assert_close(net(x[:, 5:], cache=seen), whole[:, 5:])
    # what else is asked for is there
    _, more = net(x, return_intermediates='cache', return_attn_z_loss=True)
    assert more.attn_intermediates
