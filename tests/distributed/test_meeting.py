"""Processes that were started together find each other, whatever those that were started before them have left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers.distributed import meeting
from x_transformers.distributed.command import is_first_in
from x_transformers.distributed.meeting import Meeting, meet

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')

SIZE = 3


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One store for all threads, each of which is the process of its number."""
    made = torch.distributed.HashStore()
    monkeypatch.setattr(meeting, 'rendezvous', lambda url, timeout: iter([(made, here.rank, SIZE)]))
    return made


here = threading.local()


def told(start: int, late: int | None = None, gone: int | None = None, timeout: float = 20.0) -> list[Meeting | str]:
    """What each process of a start finds."""

    def process(rank: int) -> Meeting | str:
        here.rank = rank
        time.sleep(0.3 if rank == late else 0.0)
        try:
            return meet((start, rank), timeout=timeout)
        except TimeoutError as error:
            return str(error)

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(process, [rank for rank in range(SIZE) if rank != gone]))


def counted(found: list[Meeting | str]) -> Iterator[int]:
    """How many have counted in the store of each, one after the other."""
    for each in found:
        assert isinstance(each, Meeting)
        yield each.store.add('here', 1)


@pytest.mark.parametrize('late', range(SIZE))
def test_the_dead_are_not_taken_for_the_living(store: Any, late: int) -> None:
    first = told(0)
    assert [each.entries for each in first if isinstance(each, Meeting)] == [[(0, 0), (0, 1), (0, 2)]] * SIZE
    second = told(1, late=late)
    assert [each.entries for each in second if isinstance(each, Meeting)] == [[(1, 0), (1, 1), (1, 2)]] * SIZE
    # nothing that the first have left is found by the second
    assert list(counted(first)) == list(counted(second)) == [1, 2, 3]


def test_those_who_tell_the_same_again_are_others(store: Any) -> None:
    assert list(counted(told(0))) == list(counted(told(0, late=1))) == [1, 2, 3]


def test_one_that_does_not_come_is_not_waited_for_longer(store: Any) -> None:
    told(0)
    assert told(1, gone=1, timeout=0.5) == ['not all processes have come in time'] * (SIZE - 1)


def test_without_a_store_one_speaks(tmp_path: Path) -> None:
    assert [is_first_in(tmp_path) for _ in range(SIZE)] == [True, False, False]
    assert is_first_in(tmp_path / 'not yet there')
