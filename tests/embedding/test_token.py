"""Token tables, what is summed in, and what stands in front."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from x_transformers.embedding.token import (
    TokenEmbedding,
    add_named,
    check_mask,
    named_tables,
    prepend_rows,
    scale_gradient,
    true_in_front,
)


def same(t: torch.Tensor, name: str) -> torch.Tensor:
    return t


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_rows_are_looked_up_by_integers_of_any_width(dtype: torch.dtype) -> None:
    emb = TokenEmbedding(4, 10)
    ids = torch.tensor([[1, 9, 0]])
    assert torch.equal(emb(ids.to(dtype)), emb.emb.weight[ids])


def test_unit_length() -> None:
    emb = TokenEmbedding(4, 10, l2norm_embed=True)
    out = emb(torch.arange(10).unsqueeze(0))
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(1, 10))
    torch.testing.assert_close(out[0], emb.emb.weight / emb.emb.weight.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize('redraw', ['init_', 'reset_parameters', 'meta'])
@pytest.mark.parametrize('l2norm', [True, False])
def test_start_of_the_table(l2norm: bool, redraw: str) -> None:
    wanted = 1e-5 if l2norm else math.sqrt(2 / 64)
    if redraw == 'meta':
        with torch.device('meta'):
            emb = TokenEmbedding(64, 500, l2norm)
        emb.to_empty(device='cpu').reset_parameters()
    else:
        emb = TokenEmbedding(64, 500, l2norm)
        before = emb.emb.weight.clone()
        getattr(emb, redraw)()
        assert not torch.equal(before, emb.emb.weight)
    assert emb.emb.weight.std().item() == pytest.approx(wanted, rel=0.03)


def test_ids_out_of_range_are_named() -> None:
    with pytest.raises(IndexError, match=r'0 … 9 .* range from -100 to 3'):
        TokenEmbedding(4, 10)(torch.tensor([[3, -100]]))
    with pytest.raises(IndexError, match='range from 3 to 10'):
        TokenEmbedding(4, 10)(torch.tensor([[3, 10]]))


@pytest.mark.parametrize('ids', [torch.full((1, 2), 0.5), torch.zeros(1, 2, dtype=torch.bool)])
def test_ids_that_are_no_integers_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TypeError, match='token ids must be integers'):
        TokenEmbedding(4, 10)(ids)


def test_named_tables_are_summed_in() -> None:
    tables = named_tables({'a': 3, 'b': 5}, 4)
    assert tables is not None
    assert set(tables) == {'a_embed', 'b_embed'}
    x, a, b = torch.randn(2, 3, 4), torch.randint(0, 3, (2, 3)), torch.randint(0, 5, (2, 3))
    wanted = x + tables['a_embed'].weight[a] + tables['b_embed'].weight[b]
    torch.testing.assert_close(add_named(x, tables, {'a': a, 'b': b}, same), wanted)
    assert named_tables({}, 4) is None
    assert add_named(x, None, {}, same) is x


@pytest.mark.parametrize(('given', 'says'), [({}, 'missing: a'), ({'a': 0, 'c': 0}, 'unknown: c')])
def test_names_of_further_tables_must_match(given: dict[str, int], says: str) -> None:
    ids = {name: torch.zeros(1, 2).long() for name in given}
    with pytest.raises(ValueError, match=says):
        add_named(torch.randn(1, 2, 4), named_tables({'a': 3}, 4), ids, same)
    with pytest.raises(ValueError, match='which is nothing'):
        add_named(torch.randn(1, 2, 4), None, {'a': torch.zeros(1, 2).long()}, same)


def test_fraction_of_the_gradient() -> None:
    x = torch.randn(3, requires_grad=True)
    out = scale_gradient(x, 0.25)
    torch.testing.assert_close(out, x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.25))


def test_rows_in_front_and_their_mask() -> None:
    rows, x = torch.randn(2, 2, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    both, none = prepend_rows(rows, x, None)
    assert torch.equal(both, torch.cat((rows, x), dim=1))
    assert none is None
    _, longer = prepend_rows(rows, x, mask)
    assert longer is not None
    assert longer.tolist() == [[True, True, True, True, False], [True, True, True, False, False]]
    _, other = prepend_rows(rows, x, None, torch.tensor([[False, True], [True, True]]))
    assert other is not None
    assert other[0].tolist() == [False, True, True, True, True]
    assert torch.equal(true_in_front(mask, 2), longer)


def test_masks_of_another_kind_or_length_are_refused() -> None:
    with pytest.raises(TypeError, match='mask must be boolean'):
        check_mask(torch.ones(2, 3), 2, 3)
    with pytest.raises(ValueError, match=r'shape \(2, 3\)'):
        check_mask(torch.ones(2, 4).bool(), 2, 3)
    check_mask(None, 2, 3)
    check_mask(torch.ones(2, 3).bool(), 2, 3)


def test_tables_are_modules_of_the_state_dict() -> None:
    assert list(TokenEmbedding(4, 10).state_dict()) == ['emb.weight']
    assert isinstance(TokenEmbedding(4, 10).emb, nn.Embedding)
