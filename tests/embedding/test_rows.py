"""Which rows the stack sees."""

from __future__ import annotations

import pytest
import torch

from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.rows import Rows

NONE = MemoryTokens()


def cache_of(rows: int, front: int = 0, evicted: int = 0) -> KVCache:
    cache = KVCache(rows + evicted, front)
    cache.step(0).extend(k=torch.zeros(1, 1, rows, 2))
    return cache


@pytest.mark.parametrize(
    ('given', 'options', 'new'),
    [
        (1, {}, 1),
        (5, {}, 5),
        (6, {}, 1),
        (9, {}, 4),
        (9, {'new_only': True}, 9),
        (9, {'cache_age': 3}, 3),
        (4, {'cache_age': 0}, 4),
        (6, {'cache_age': 1}, 1),
        (4, {'cache_age': 1}, 1),
    ],
)
def test_new_tokens_are_told_from_seen_ones(given: int, options: dict[str, int], new: int) -> None:
    rows = Rows.of_call(given, 0, NONE, cache_of(5), **options)
    assert (rows.new, rows.held, rows.seen) == (new, 5, 5)


def test_rows_in_front_are_not_counted_as_tokens() -> None:
    rows = Rows.of_call(6, 3, NONE, cache_of(8, front=3))
    assert (rows.new, rows.held, rows.seen, rows.front_keys, rows.tokens) == (1, 5, 5, 3, 6)
    # the caller need not repeat them
    assert Rows.of_call(6, 0, NONE, cache_of(8, front=3)) == rows


def test_rows_that_have_left_the_window() -> None:
    rows = Rows.of_call(5, 0, NONE, cache_of(4, front=3, evicted=4))
    assert (rows.new, rows.held, rows.seen, rows.front_keys) == (1, 4, 5, 0)


def test_nothing_cached() -> None:
    for cache in (None, KVCache()):
        rows = Rows.of_call(4, 2, MemoryTokens(3), cache)
        assert (rows.new, rows.held, rows.seen, rows.front_keys, rows.cached) == (4, 0, 0, 5, False)


def test_mask_covers_rows_in_front() -> None:
    rows = Rows.of_call(3, 3, NONE)
    mask, prepend = torch.tensor([[True, False, True]]), torch.tensor([[False, True]])
    got = rows.mask(mask, prepend, 1, mask.device)
    assert got is not None
    assert got.tolist() == [[True, False, True, True, False, True]]
    only = rows.mask(None, prepend, 1, mask.device)
    assert only is not None
    assert only.tolist() == [[True, False, True, True, True, True]]
    assert rows.mask(None, None, 1, mask.device) is None


@pytest.mark.parametrize('length', [1, 6, 8])
def test_mask_with_a_cache(length: int) -> None:
    rows = Rows.of_call(1, 0, NONE, cache_of(7, front=2))
    got = rows.mask(torch.ones(1, length).bool(), None, 1, torch.device('cpu'))
    assert got is not None
    assert got.shape[1] == (1 if length == 1 else 8)
    with pytest.raises(ValueError, match='those in the cache included'):
        rows.mask(torch.ones(1, 4).bool(), None, 1, torch.device('cpu'))


def test_positions_go_on_behind_the_front() -> None:
    rows = Rows.of_call(3, 2, NONE)
    got = rows.positions(torch.tensor([0, 5, 6]))
    assert got is not None
    assert got.tolist() == [0, 1, 2, 7, 8]
    assert rows.positions(None) is None


def test_padding_goes_in_front_of_everything() -> None:
    order = Rows.of_call(3, 2, NONE).padding_first(torch.tensor([0, 2]))
    assert order is not None
    names = torch.tensor([[10, 11, 0, 1, 2]])
    there = order.permute(names)
    assert there.tolist() == [[10, 11, 0, 1, 2], [0, 1, 10, 11, 2]]
    assert order.restore(there).tolist() == [[10, 11, 0, 1, 2]] * 2
    wide = torch.randn(2, 5, 3)
    assert torch.equal(order.restore(order.permute(wide)), wide)
    assert Rows.of_call(3, 0, NONE).padding_first(torch.tensor([0, 1])) is None
    assert Rows.of_call(3, 2, NONE).padding_first(None) is None


def test_positions_of_a_continued_sequence() -> None:
    rows = Rows.of_call(1, 0, NONE, cache_of(5, front=2))
    new = rows.positions(torch.tensor([3]))
    assert new is not None
    assert new.tolist() == [5]
    whole = rows.positions(torch.tensor([0, 1, 2, 3]))
    assert whole is not None
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def test_positions_between_windows_are_refused() -> None:
    rows = Rows.of_call(4, 0, MemoryTokens(1, 2))
    with pytest.raises(ValueError, match='interspersed'):
        rows.positions(torch.arange(4))


def test_masks_of_the_stack_are_stretched() -> None:
    rows = Rows.of_call(2, 1, MemoryTokens(1))
    keys, dense = torch.tensor([[False, True]]), torch.tensor([[True, False], [True, True]])
    got = rows.stretched({'self_attn_kv_mask': keys, 'attn_mask': dense, 'attn_bias': torch.ones(2, 2), 'context': 'same'})
    assert got['self_attn_kv_mask'].tolist() == [[True, True, False, True]]
    assert got['attn_mask'][2:, 2:].tolist() == dense.tolist()
    assert got['attn_mask'].sum() == 16 - 1
    assert got['attn_bias'].sum() == 4
    assert got['context'] == 'same'
    wide = {'attn_mask': torch.ones(4, 4).bool()}
    assert rows.stretched(wide)['attn_mask'] is wide['attn_mask']
    with pytest.raises(ValueError, match='longer sequence'):
        Rows.of_call(2, 0, MemoryTokens(1, 1)).stretched({'attn_mask': dense})


def test_pairs_of_all_tokens_are_cut_to_the_new_rows() -> None:
    """Of a sequence that goes on from a cache with rows in front, what was said of pairs of tokens is said of all of them."""
    rows = Rows(new=1, memory=NONE, front=2, held=2, seen=2, front_held=2, cached=True)
    bias = torch.arange(9.0).view(3, 3)
    assert rows.stretched({'attn_bias': bias})['attn_bias'].tolist() == [[0, 0, 6, 7, 8]]
    assert rows.stretched({'attn_bias': bias[2:]})['attn_bias'].tolist() == [[0, 0, 6, 7, 8]]


def test_newest_part() -> None:
    rows = Rows.of_call(1, 0, NONE, cache_of(3))
    t = torch.arange(4).view(1, 4)
    assert rows.newest(t, 't').tolist() == [[3]]
    with pytest.raises(ValueError, match='t must have one entry for each of the 2 tokens'):
        Rows.of_call(2, 0, NONE).newest(t, 't')
    one = torch.zeros(1, 1, 3)
    assert Rows.of_call(4, 0, NONE).summand(one, 'one') is one


def test_ids_of_rows_that_are_no_tokens() -> None:
    assert Rows.of_call(2, 2, MemoryTokens(1)).token_ids(torch.tensor([[7, 8]]), 9).tolist() == [[9, 9, 9, 7, 8]]
