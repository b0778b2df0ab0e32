"""Memory tokens: laid in, seen, taken out."""

from __future__ import annotations

import pytest
import torch

from x_transformers.embedding.memory_tokens import MemoryTokens


@pytest.mark.parametrize('every', [None, 1, 3, 4, 10])
@pytest.mark.parametrize('length', [1, 4, 7])
def test_what_is_laid_in_can_be_taken_out(every: int | None, length: int) -> None:
    memory, tokens, x = MemoryTokens(2, every), torch.randn(2, 5), torch.randn(3, length, 5)
    longer, mask = memory.insert(tokens, x, None)
    assert mask is None
    rest, out = memory.remove(longer, length)
    assert torch.equal(rest, x)
    windows = 1 if every is None else -(-length // every)
    assert out.shape == (3 * windows, 2, 5)
    assert all(torch.equal(each, tokens) for each in out)


def test_layout_of_windows() -> None:
    # two memory tokens (100, 200) in front of each window of three; the last window is filled up
    memory = MemoryTokens(2, 3)
    tokens, x = torch.tensor([[100.0], [200.0]]), torch.arange(1.0, 5.0).view(1, 4, 1)
    mask = torch.tensor([[True, True, False, True]])
    longer, wider = memory.insert(tokens, x, mask)
    assert longer.flatten().tolist() == [100, 200, 1, 2, 3, 100, 200, 4, 0, 0]
    assert wider is not None
    assert wider[0].tolist() == [True, True, True, True, False, True, True, True, False, False]
    assert memory.ids(torch.tensor([[1, 2, 3, 4]]), -1).tolist() == [[-1, -1, 1, 2, 3, -1, -1, 4, -1, -1]]
    assert MemoryTokens(2).ids(torch.tensor([[1, 2]]), -1).tolist() == [[-1, -1, 1, 2]]


def test_mask_in_front() -> None:
    assert MemoryTokens(2).mask(torch.tensor([[False, True]])).tolist() == [[True, True, False, True]]


def test_no_memory_is_false() -> None:
    assert not MemoryTokens()
    assert MemoryTokens(1)
