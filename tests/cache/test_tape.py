from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from x_transformers.cache.tape import LEAST_ROOM, Tape


def histories(seed: int, grad: bool) -> None:
    """Random appends, cuts, windows, gathers and branches; every tape ever made must keep its value."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    first = torch.randn(2, 3, rng.randint(0, 5), 4)
    alive: list[tuple[Tape, Tensor]] = [(Tape.of(first), first.clone())]
    for _ in range(40):
        tape, value = rng.choice(alive[-4:])
        move = rng.choice(['append', 'append', 'append', 'cut', 'last', 'rows'])
        if move == 'append':
            new = torch.randn(value.shape[0], 3, rng.choice([1, 1, 1, 7, 90]), 4, requires_grad=grad)
            tape, value = tape.append(new), torch.cat((value, new.detach()), dim=-2)
        elif move == 'cut':
            length = rng.randint(0, tape.length)
            tape, value = tape.cut(length), value[..., :length, :]
        elif move == 'last':
            n = rng.randint(0, tape.length + 2)
            tape, value = tape.last(n), value[..., max(value.shape[-2] - n, 0) :, :]
        else:
            index = torch.tensor([rng.randrange(value.shape[0]) for _ in range(rng.randint(1, 3))])
            tape, value = tape.rows(index), value[index]
        alive.append((tape, value.clone()))
    for tape, value in alive:
        assert tape.length == value.shape[-2]
        assert torch.equal(tape.value, value)


@pytest.mark.parametrize('seed', range(60))
def test_random_histories_equal_cat_without_gradients(seed: int) -> None:
    with torch.no_grad():
        histories(seed, grad=False)


@pytest.mark.parametrize('seed', range(10))
def test_random_histories_equal_cat_with_gradients(seed: int) -> None:
    histories(seed, grad=True)


@pytest.mark.parametrize('seed', range(10))
def test_random_histories_equal_cat_in_inference_mode(seed: int) -> None:
    with torch.inference_mode():
        histories(seed, grad=False)


def test_of_keeps_the_tensor_itself() -> None:
    t = torch.randn(1, 2, 5, 3)
    assert Tape.of(t).value is t


@torch.no_grad()
def test_appends_share_memory_and_rarely_move() -> None:
    tape = Tape.of(torch.zeros(1, 1, 1, 2))
    places = set()
    for _ in range(1000):
        tape = tape.append(torch.zeros(1, 1, 1, 2))
        places.add(tape.value.data_ptr())
    assert len(places) < 10


@torch.no_grad()
def test_reserve_moves_once() -> None:
    tape = Tape.of(torch.zeros(1, 1, 3, 2)).reserved(500)
    places = set()
    for _ in range(500):
        tape = tape.append(torch.zeros(1, 1, 1, 2))
        places.add(tape.value.data_ptr())
    assert len(places) == 1


@torch.no_grad()
def test_a_sliding_window_does_not_copy_at_every_step() -> None:
    tape, moves, room = Tape.of(torch.zeros(1, 1, 4, 2)), 0, None
    for i in range(10 * LEAST_ROOM):
        tape = tape.last(3).append(torch.full((1, 1, 1, 2), float(i)))
        moves += tape._room is not room
        room = tape._room
    assert tape.value[0, 0, :, 0].tolist() == [636.0, 637.0, 638.0, 639.0]
    assert moves < 15


@torch.no_grad()
def test_an_owner_may_overwrite_what_it_cut_off() -> None:
    tape = Tape.of(torch.zeros(1, 1, 1, 1)).append(torch.ones(1, 1, 3, 1))
    place = tape.value.data_ptr()
    again = tape.cut(2, own=True).append(torch.full((1, 1, 2, 1), 7.0))
    assert again.value.flatten().tolist() == [0.0, 1.0, 7.0, 7.0]
    assert again.value.data_ptr() == place


def test_owning_cut_never_writes_into_a_tensor_that_was_handed_in() -> None:
    given = torch.arange(4.0).view(1, 1, 4, 1)
    with torch.no_grad():
        Tape.of(given).cut(2, own=True).append(torch.full((1, 1, 2, 1), 9.0))
    assert given.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_gradients_reach_every_append() -> None:
    parts = [torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3)]
    tape = Tape.of(parts[0]).append(parts[1]).append(parts[2])
    (tape.value * 2).sum().backward()
    for part in parts:
        assert torch.equal(part.grad, torch.full_like(part, 2.0))


def test_memory_of_inference_mode_is_not_written_outside() -> None:
    with torch.inference_mode():
        tape = Tape.of(torch.zeros(1, 1, 1, 1)).append(torch.ones(1, 1, 1, 1))
    with torch.no_grad():
        longer = tape.append(torch.full((1, 1, 1, 1), 2.0))
    assert longer.value.flatten().tolist() == [0.0, 1.0, 2.0]


def test_fixed_tapes_neither_grow_nor_shrink() -> None:
    tape = Tape.of(torch.randn(2, 1, 4, 3), fixed=True)
    assert tape.cut(1) is tape
    assert tape.last(1) is tape
    assert torch.equal(tape.rows(torch.tensor([1])).value, tape.value[1:])
    assert tape.rows(torch.tensor([1])).fixed
    with pytest.raises(ValueError, match='must stay as they are, got new rows'):
        tape.append(torch.randn(2, 1, 1, 3))


def test_rows_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r'\(2, 1, n, 3\).*\(1, 1, n, 3\)'):
        Tape.of(torch.randn(2, 1, 4, 3)).append(torch.randn(1, 1, 1, 3))
    with pytest.raises(ValueError, match=r'in 0 to 4, .*got 5'):
        Tape.of(torch.randn(2, 1, 4, 3)).cut(5)
    with pytest.raises(ValueError, match='got -1'):
        Tape.of(torch.randn(2, 1, 4, 3)).last(-1)
