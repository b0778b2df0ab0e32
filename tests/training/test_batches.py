from __future__ import annotations

import collections
import threading

import pytest
import torch

from x_transformers.training.batches import IGNORED, Mixture, Prefetched, TokenBatches, held_out_rows, permuted
from x_transformers.training.shards import TextPart, TokenText


def text_of(documents, prompts=None):
    """A text of two parts from lists of ids."""
    prompts = prompts or [0] * len(documents)
    half = len(documents) // 2 or 1
    parts = []
    for chosen, own in ((documents[:half], prompts[:half]), (documents[half:], prompts[half:])):
        tokens = torch.tensor([token for document in chosen for token in document], dtype=torch.uint8)
        ends = torch.tensor([len(document) for document in chosen]).cumsum(0)
        parts.append(TextPart(tokens, ends, torch.tensor(own, dtype=torch.int32)))
    return TokenText(parts, sum(map(len, documents)))


@pytest.mark.parametrize('count', [1, 2, 3, 10, 63, 64, 65, 1000])
def test_an_order_is_a_permutation(count):
    orders = [[permuted(number, count, seed) for number in range(count)] for seed in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 9:
        assert orders[0] != orders[1] != list(range(count))


def test_an_epoch_predicts_every_token_but_the_first_once():
    text = text_of([list(range(50)), list(range(50, 121))])
    batches = TokenBatches([(text, 1.0)], batch=4, window=7, seed=3)
    for epoch in range(2):
        rows = torch.cat([batches.batch(5 * epoch + index) for index in range(5)])
        assert sorted(rows[:, 1:].flatten().tolist()) == list(range(1, 121))
    assert not torch.equal(batches.batch(0), batches.batch(5))


def test_ranks_share_the_rows_of_one_process():
    text = text_of([list(range(100)), list(range(100, 200))])
    alone = TokenBatches([(text, 1.0)], batch=8, window=5, seed=0)
    for world_size in (2, 4):
        parts = [
            TokenBatches([(text, 1.0)], batch=8, window=5, seed=0, rank=r, world_size=world_size) for r in range(world_size)
        ]
        for index in (0, 7):
            rows = torch.stack([part.batch(index) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(rows, alone.batch(index))


def test_a_mixture_keeps_its_shares_and_loses_no_row():
    mixture = Mixture([0.7, 0.2, 0.1], seed=5)
    places = [mixture.place(number) for number in range(3000)]
    counts = collections.Counter(which for which, _ in places)
    assert counts == {0: 2100, 1: 600, 2: 300}
    for which in range(3):
        assert [place for found, place in places if found == which] == list(range(counts[which]))
    assert collections.Counter(which for which, _ in places[:100])[0] in range(50, 90)
    assert mixture.place(2500) == Mixture([0.7, 0.2, 0.1], seed=5).place(2500)


def test_prompts_are_read_and_not_predicted():
    documents = [[1, 2, 3, 4, 5], [11, 12, 13], [21, 22, 23, 24, 25, 26]]
    text = text_of(documents, prompts=[2, 0, 4])
    batches = TokenBatches([(text, 1.0)], batch=1, window=14, seed=0)
    row = batches.batch(0)
    wanted = [IGNORED, 3, 4, 5, 11, 12, 13, IGNORED, IGNORED, IGNORED, IGNORED, 25, 26, IGNORED]
    assert row['x'][0].tolist() == [token for document in documents for token in document]
    assert row['targets'][0].tolist() == wanted
    assert batches.predictions(row) == 8
    assert 'attn_mask' not in row


def test_documents_apart_neither_see_nor_predict_each_other():
    text = text_of([[1, 2, 3], [11, 12], [21, 22, 23, 24]])
    row = TokenBatches([(text, 1.0)], batch=1, window=9, seed=0, apart=True).batch(0)
    assert row['targets'][0].tolist() == [2, 3, IGNORED, 12, IGNORED, 22, 23, 24, IGNORED]
    same = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.ones(4, 4)).bool()
    assert torch.equal(row['attn_mask'][0, 0], same)


def test_windows_that_begin_inside_documents():
    documents = [list(range(10 * n + 1, 10 * n + 8)) for n in range(10)]
    prompts = [3] * 10
    text = text_of(documents, prompts)
    owner = {token: n for n, document in enumerate(documents) for token in document}
    asked = {token for document in documents for token in document[:3]}
    batches = TokenBatches([(text, 1.0)], batch=6, window=12, seed=1, apart=True)
    row = batches.batch(0)
    for ids, targets, mask in zip(row['x'].tolist(), row['targets'].tolist(), row['attn_mask'][:, 0].tolist(), strict=True):
        for i in range(11):
            hidden = ids[i + 1] in asked or owner[ids[i + 1]] != owner[ids[i]]
            assert targets[i] == (IGNORED if hidden else ids[i + 1])
        for i in range(12):
            assert mask[i] == [owner[ids[i]] == owner[other] for other in ids]


def test_apart_documents_have_the_loss_that_they_have_alone():
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=2, heads=2, rotary_pos_emb=True)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=30, max_seq_len=16, attn_layers=layers)).eval()
    documents = [[1, 2, 3, 4], [11, 12], [21, 22, 23, 24, 25]]
    row = TokenBatches([(text_of(documents), 1.0)], batch=1, window=11, seed=0, apart=True).batch(0)
    with torch.no_grad():
        alone = [model(torch.tensor([document])).item() * (len(document) - 1) for document in documents]
        torch.testing.assert_close(model(**row).item(), sum(alone) / 8, atol=1e-5, rtol=1e-5)


def test_held_out_rows_predict_every_token_once():
    text = text_of([list(range(30)), list(range(30, 95))])
    rows = list(held_out_rows(text, batch=3, window=8, apart=False))
    assert sorted(token for row, _ in rows for ids in row for token in ids[1:].tolist()) == list(range(1, 95))
    assert sum(count for _, count in rows) == 94


def test_prefetched_batches_are_the_same_and_come_from_a_thread():
    threads = set()

    class Slow:
        predictions = staticmethod(lambda batch: 1)

        def batch(self, index):
            threads.add(threading.current_thread())
            return torch.tensor([index])

    batches = Prefetched(Slow(), last=6)
    assert [int(batches.batch(index)) for index in (0, 1, 2, 3, 4, 5)] == [0, 1, 2, 3, 4, 5]
    assert int(batches.batch(2)) == 2  # not the next one
    assert threading.current_thread() not in threads
    batches.close()
