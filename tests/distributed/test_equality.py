"""Copies, shards, and shards whose layers are computed again give the loss and the gradients of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.equality import MODES, attempt
from tests.laws.combination import draw, rotated
from tests.two_processes import attempt_all, with_modes
from x_transformers.distributed.mesh import Degrees, MeshError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')

SOME = ['decoder+layer_dropout', 'encoder+attn_pool', 'decoder+tied', 'decoder+streams']


@pytest.mark.slow
def test_some_are_equal() -> None:
    cases = [*SOME, *(str(case) for case in draw(4, seed=0))]
    modes = ['copies', 'shards+full', 'hybrid']
    done, failed = attempt_all(attempt, with_modes(cases, modes))
    assert not failed, '\n'.join(failed)
    assert done == len(cases) * len(modes)


@pytest.mark.deep
def test_every_flag_is_equal() -> None:
    cases = [str(case) for case in rotated()]
    done, failed = attempt_all(attempt, with_modes(cases, list(MODES)))
    assert not failed, '\n'.join(failed)
    assert done == len(cases) * len(MODES)


@pytest.mark.deep
def test_random_combinations_are_equal() -> None:
    cases = [str(case) for case in draw(60, seed=1)]
    done, failed = attempt_all(attempt, with_modes(cases, ['copies', 'shards', 'shards+every']))
    assert not failed, '\n'.join(failed)
    assert done == 3 * len(cases)


def test_a_grid_takes_the_rest() -> None:
    assert Degrees(replicate=-1).resolved(8) == Degrees(replicate=8)
    assert Degrees.of('full', tensor=2).resolved(8) == Degrees(shard=4, tensor=2)
    assert Degrees.of('hybrid', per_node=4).resolved(8) == Degrees(replicate=2, shard=4)


@pytest.mark.parametrize(
    ('degrees', 'said'),
    [
        (Degrees(replicate=3), 'must be 3'),
        (Degrees(shard=-1, tensor=3), 'multiple of 3'),
        (Degrees(replicate=-1, shard=-1), 'one axis alone'),
        (Degrees(shard=0), 'shard must be a positive number'),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(degrees: Degrees, said: str) -> None:
    with pytest.raises(MeshError, match=said):
        degrees.resolved(4)
