"""The checks that run under other tests see what they should."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.poison import poisoned
from tests.shapes import ShapeError, checked, shapes_checked, swaps
from x_transformers.norms import RMSNorm
from x_transformers.position import rotary
from x_transformers.tensor_types import Bool, Float, Int


def add(
    x: Float[Tensor, 'b n d'], y: Float[Tensor, '#b n d'], mask: Bool[Tensor, 'b n'] | None = None
) -> Float[Tensor, 'b n d']:
    return x + y


def ids(x: Int[Tensor, '... n'], parts: Sequence[Float[Tensor, 'l 2']] = ()) -> tuple[Int[Tensor, '... n'], int]:
    return x, 1


def wrong(x: Float[Tensor, 'b n']) -> Float[Tensor, 'n b']:
    return x


def choice(x: Float[Tensor, 'n d'] | Float[Tensor, 'b n d'], mask: Bool[Tensor, '#b n|1']) -> None: ...


X, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)


def test_what_fits_passes() -> None:
    assert checked(add)(X, X[:1], mask=MASK).shape == X.shape
    assert checked(ids)(torch.zeros(5, 2, 3).long(), [torch.zeros(1, 2), torch.zeros(7, 2)])[1] == 1
    checked(choice)(X[0], MASK)
    checked(choice)(X, MASK[:1, :1])
    assert checked(len) is None


@pytest.mark.parametrize(
    ('fn', 'args'),
    [
        (add, (X, X[..., :2].repeat(1, 1, 2)[..., :1])),
        (add, (X, X.double()[:, :1])),
        (add, (X, X, MASK[:, :2])),
        (add, (X, X, MASK.float())),
        (add, (X[0], X[0])),
        (ids, (X,)),
        (ids, (MASK,)),
        (ids, (MASK.long(), [X[0]])),
        (wrong, (X[0],)),
        (choice, (X[None], MASK)),
        (choice, (X, MASK[:, :2])),
    ],
)
def test_what_does_not_fit_is_told(fn: object, args: tuple[Tensor, ...]) -> None:
    with pytest.raises(ShapeError, match='is annotated'):
        checked(fn)(*args)  # type: ignore[arg-type,misc]


def test_the_package_is_checked_and_left_as_it_was() -> None:
    assert len(swaps()) > 300
    plain, forward = rotary.rotate_half, RMSNorm.forward
    with shapes_checked():
        assert rotary.rotate_half is not plain
        assert RMSNorm.forward is not forward
        with pytest.raises(ShapeError):
            rotary.rotate_half(torch.zeros(2, 4).long())
    assert rotary.rotate_half is plain
    assert RMSNorm.forward is forward


def test_what_nobody_filled_is_seen() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(X).isnan().all()
        assert X.new_empty(2).isnan().all()
        assert torch.empty(3, dtype=torch.long).dtype == torch.long
        assert torch.empty(2, device='meta').is_meta
        assert not nn.Linear(2, 3).weight.isnan().any()
    assert torch.empty.__name__ == 'empty'
    assert not hasattr(torch.empty, '__wrapped__')
