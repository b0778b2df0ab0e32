from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import decoder, ids
from x_transformers import EntropyBasedTokenizer
from x_transformers.entropy_based_tokenizer import calc_entropy_from_logits


class Surprised(nn.Module):
    """A stand-in for a language model: sure of itself, but for what follows the positions ``at``."""

    def __init__(self, at: list[int]) -> None:
        super().__init__()
        self.at = at
        self.modes: list[bool] = []

    def forward(self, seq: Tensor, **given: Any) -> Tensor:
        self.modes.append(self.training)
        logits = torch.zeros(*seq.shape, 4)
        logits[..., 0] = 50.0
        logits[:, self.at] = 0.0
        return logits


def tokenizer(at: list[int], size: int | None = None) -> EntropyBasedTokenizer:
    return EntropyBasedTokenizer(Surprised(at), entropy_threshold=1.0, max_token_size=size)


@pytest.mark.parametrize(
    ('size', 'lengths'),
    [(None, [3, 6, 1]), (2, [2, 1, 2, 2, 2, 1]), (3, [3, 3, 3, 1]), (1, [1] * 10), (20, [3, 6, 1])],
)
def test_boundaries_after_3_9_10(size: int | None, lengths: list[int]) -> None:
    assert tokenizer([2, 8], size)(torch.arange(10)).tolist() == lengths


def by_loop(entropies: list[float], threshold: float, length: int, size: int | None) -> list[int]:
    sizes, current = [], 0
    for position in range(length):
        current += 1
        if entropies[position] >= threshold or position == length - 1 or current == size:
            sizes.append(current)
            current = 0
    return sizes


@pytest.mark.parametrize('size', [None, 1, 2, 3])
def test_against_a_loop_with_lengths(size: int | None) -> None:
    net = decoder().eval()
    seq, lens = ids(5, 12), torch.tensor([12, 1, 7, 11, 4])
    entropies = calc_entropy_from_logits(net(seq)).detach()
    threshold = entropies.median().item()
    model = EntropyBasedTokenizer(net, threshold, size)
    got = model(seq, lens=lens)
    expected = [by_loop(entropies[row].tolist(), threshold, int(lens[row]), size) for row in range(5)]
    assert got.shape == (5, max(map(len, expected)))
    assert [[n for n in row if n] for row in got.tolist()] == expected

    pieces = model(seq, lens=lens, return_segmented_seq=True)
    for row in range(5):
        assert [len(piece) for piece in pieces[row]] == expected[row]
        torch.testing.assert_close(torch.cat(pieces[row]), seq[row, : lens[row]])
        alone = model(seq[row], lens=lens[row : row + 1])
        assert alone.tolist() == expected[row]


def test_entropy_of_even_odds() -> None:
    entropy = calc_entropy_from_logits(torch.tensor([[0.0, 0.0, -math.inf], [3.0, 3.0, 3.0], [900.0, 0.0, 0.0]]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), math.log(3), 0.0]))


def test_modes_come_back() -> None:
    """In the original the decoder stays in evaluation mode."""
    model = tokenizer([2])
    model.train()
    model(torch.arange(5))
    assert model.decoder.modes == [False]
    assert model.decoder.training
    with pytest.raises(ValueError, match='lens'):
        model(torch.arange(5), lens=torch.tensor([9]))
    assert model.decoder.training


def test_keywords_reach_the_decoder() -> None:
    net = decoder().eval()
    model = EntropyBasedTokenizer(net, 1.2)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 0] = True
    net_entropy = calc_entropy_from_logits(net(ids(2, 12), self_attn_kv_mask=mask)).detach()
    closes = (net_entropy >= 1.2)[:, :-1].sum(dim=-1) + 1
    got = model(ids(2, 12), decoder_forward_kwargs={'self_attn_kv_mask': mask})
    assert (got > 0).sum(dim=-1).tolist() == closes.tolist()


def test_state_is_the_decoders() -> None:
    net = decoder()
    assert list(EntropyBasedTokenizer(net, 1.0).state_dict()) == [f'decoder.{k}' for k in net.state_dict()]


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'seq': torch.zeros(2, 0, dtype=torch.long)}, 'seq'),
        ({'seq': ids(1, 2, 3)}, 'seq'),
        ({'seq': ids(2, 5), 'lens': torch.tensor([5])}, 'lens'),
        ({'seq': ids(2, 5), 'lens': torch.tensor([5, 6])}, 'lens'),
        ({'seq': ids(2, 5), 'lens': torch.tensor([5, 0])}, 'lens'),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], says: str) -> None:
    model = tokenizer([2])
    with pytest.raises(ValueError, match=f'^{says} must'):
        model(**given)
    assert model.decoder.modes == []
    with pytest.raises(ValueError, match='max_token_size'):
        tokenizer([2], size=0)


def test_accumulated_entropies_close_segments_as_a_loop_does():
    tokenizer = EntropyBasedTokenizer(torch.nn.Identity(), 1.0, accumulate_entropy=True)
    entropies = torch.tensor([[0.3, 0.3, 0.5, 0.2, 1.5, 0.1, 0.9, 0.2]])
    assert tokenizer.boundaries(entropies, None)[0].nonzero()[:, 0].tolist() == [2, 4, 6, 7]
    for length in (1, 2, 3, 31, 64, 65):
        entropies = torch.rand(5, length, generator=torch.Generator().manual_seed(length)) * 0.7
        tokenizer.ignore_entropy_below = 0.2
        wanted = torch.zeros(5, length, dtype=torch.bool)
        for row in range(5):
            total = 0.0
            for at, entropy in enumerate(entropies[row].tolist()):
                total += entropy if entropy >= 0.2 else 0.0
                if total >= 1.0:
                    wanted[row, at], total = True, 0.0
        wanted[:, -1] = True
        assert torch.equal(tokenizer.boundaries(entropies, None), wanted)


def test_a_floor_at_the_threshold_is_the_plain_rule():
    entropies = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) * 2
    plain = EntropyBasedTokenizer(torch.nn.Identity(), 1.0)
    floored = EntropyBasedTokenizer(torch.nn.Identity(), 1.0, accumulate_entropy=True, ignore_entropy_below=1.0)
    lens = torch.tensor([50, 20, 1, 33])
    assert torch.equal(plain.boundaries(entropies, lens), floored.boundaries(entropies, lens))


def test_floors_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='ignore_entropy_below must be at most'):
        EntropyBasedTokenizer(torch.nn.Identity(), 1.0, accumulate_entropy=True, ignore_entropy_below=1.5)
    with pytest.raises(ValueError, match='ignore_entropy_below must be left out'):
        EntropyBasedTokenizer(torch.nn.Identity(), 1.0, ignore_entropy_below=0.5)
