"""Feeding the output back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from x_transformers.embedding.recycle import recycle, rounds


def test_rounds() -> None:
    assert rounds(None, recycling=False, training=True, longest=4) == 1
    assert rounds(1, recycling=False, training=False, longest=4) == 1
    assert rounds(3, recycling=True, training=False, longest=4) == 3
    drawn = {rounds(None, recycling=True, training=True, longest=3) for _ in range(200)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize(
    ('asked', 'recycling', 'says'), [(2, False, 'without recycling'), (None, True, 'must be given'), (0, True, 'from 1')]
)
def test_rounds_that_make_no_sense(asked: int | None, recycling: bool, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rounds(asked, recycling=recycling, training=False, longest=4)


def test_only_the_last_round_has_gradients() -> None:
    stack, proj, x = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), torch.randn(2, 4, 3)
    calls = []

    def run(h: torch.Tensor) -> tuple[torch.Tensor, int]:
        out = stack(h)
        calls.append(out.requires_grad)
        return out, len(calls)

    got, last = recycle(run, x, proj, 3)
    wanted = stack(x)
    for _ in range(2):
        wanted = stack(x + proj(wanted.detach()))
    torch.testing.assert_close(got, wanted)
    assert calls == [False, False, True]
    assert last == 3
    got.sum().backward()
    assert proj.weight.grad is not None
