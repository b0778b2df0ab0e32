from __future__ import annotations

import pytest
import torch

from x_transformers.generation.prompts import align_right, flattened, prepare_prompts, restored


@pytest.mark.parametrize('trailing', [(), (3,), (2, 3)])
def test_align_right_definition(trailing: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    t, lens = torch.randn(4, 6, *trailing), torch.tensor([6, 0, 2, 5])
    out = align_right(t, lens, pad_id=7)
    for row, length, got in zip(t, lens.tolist(), out, strict=True):
        expected = torch.cat((torch.full((6 - length, *trailing), 7.0), row[:length]))
        assert torch.equal(got, expected)


def test_align_right_keeps_ids() -> None:
    out = align_right(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 3]))
    assert out.tolist() == [[0, 1, 2], [4, 5, 6]]


def test_lists_and_lengths_become_right_aligned() -> None:
    made = prepare_prompts([torch.tensor([1]), torch.tensor([2, 3, 4])], pad_value=9)
    assert made.tokens.tolist() == [[9, 9, 1], [2, 3, 4]]
    assert made.start.tolist() == [2, 0]
    assert (made.most_pads, made.leading) == (2, (2,))


def test_equal_lengths_need_no_padding() -> None:
    made = prepare_prompts(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2]))
    assert made.start is None
    assert made.most_pads == 0


def test_any_integer_dtype_and_any_axes() -> None:
    made = prepare_prompts(torch.ones(2, 3, 4, dtype=torch.uint8))
    assert made.tokens.shape == (6, 4)
    assert made.tokens.dtype == torch.long
    assert made.unpack(torch.zeros(6, 5)).shape == (2, 3, 5)
    assert prepare_prompts(torch.ones(4, dtype=torch.int32)).unpack(torch.zeros(1, 5)).shape == (5,)


def test_prompts_may_be_empty_behind_something_else() -> None:
    assert prepare_prompts(torch.zeros(2, 0, dtype=torch.long), may_be_empty=True).tokens.shape == (2, 0)
    with pytest.raises(ValueError, match='must have at least one token'):
        prepare_prompts(torch.zeros(2, 0, dtype=torch.long))


def test_flattened_and_restored() -> None:
    t = torch.arange(24).view(2, 3, 4)
    flat, leading = flattened(t)
    assert torch.equal(restored(flat, leading), t)
    flat, leading = flattened(t[0, 0])
    assert flat.shape == (1, 4)
    assert torch.equal(restored(flat, leading), t[0, 0])
