"""Processes that were started together find each other, whatever those that were started before them have left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from x_transformers.distributed import meeting
from x_transformers.distributed.command import is_first_in
from x_transformers.distributed.meeting import Meeting, meet

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')

SIZE = 3


here = threading.local()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One store for all threads, each of which is the process of its number."""
    made = torch.distributed.HashStore()

    def found(url: str, timeout: timedelta) -> Iterator[tuple[Any, int, int]]:
        made.set_timeout(timeout)
        return iter([(made, here.rank, SIZE)])

    monkeypatch.setattr(meeting, 'rendezvous', found)
    return made


def start(monkeypatch: pytest.MonkeyPatch, count: int, late: int | None = None, gone: int | None = None) -> list[Any]:
    """What each process of a start finds, the ``count``-th of one torchrun."""
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(count))

    def process(rank: int) -> Meeting | dist.DistError:
        here.rank = rank
        time.sleep(0.3 if rank == late else 0.0)
        try:
            return meet((count, rank), timeout=20.0 if gone is None else 0.5)
        except dist.DistError as error:
            return error

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(process, [rank for rank in range(SIZE) if rank != gone]))


@pytest.mark.parametrize('late', range(SIZE))
def test_the_dead_are_not_taken_for_the_living(store: Any, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    first = start(monkeypatch, 0)
    assert [each.told for each in first] == [[(0, 0), (0, 1), (0, 2)]] * SIZE
    second = start(monkeypatch, 1, late=late)
    assert [each.told for each in second] == [[(1, 0), (1, 1), (1, 2)]] * SIZE
    # nothing that the first have left is found by the second
    for meetings in (first, second):
        assert [each.store.add('here', 1) for each in meetings] == [1, 2, 3]


def test_one_that_does_not_come_is_not_waited_for_longer(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, 0)
    found = start(monkeypatch, 1, gone=1)
    assert [type(each) for each in found] == [dist.DistStoreError] * (SIZE - 1)


def test_without_a_store_one_speaks(tmp_path: Path) -> None:
    assert [is_first_in(tmp_path) for _ in range(SIZE)] == [True, False, False]
    assert is_first_in(tmp_path / 'not yet there')
