"""How processes that were started together find each other, and what each of them tells the others.

``torchrun --max-restarts`` keeps one store over all of its starts. The store may therefore hold entries of processes that have
died, also their addresses, which PyTorch itself would use. The count of restarts does not separate the starts: each node counts
the failures of its own processes only.
"""

from __future__ import annotations

import pickle
import secrets
import time
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

ROUND = 'x-transformers/round'  # key of the newest round
PAUSE = 0.01  # seconds between two looks at the store
PATIENCE = 3.0  # seconds, of the ten in which all processes must end


class Meeting(NamedTuple):
    store: Store  # of these processes alone
    entries: list[Any]  # what each process told, by rank


def meet(own: Any = None, *, timeout: float) -> Meeting:
    """Wait until all processes are there.

    The main process collects one entry of each rank and publishes them as a round. A process joins the round that holds its own
    entry. If an entry was that of a dead process, the main process finds another one there later, and publishes the next round.

    Args:
        own: the entry of this process; it is pickled.
        timeout: seconds.

    Errors: ``torch.distributed.DistError`` or ``TimeoutError`` if a process does not come in time, ``ValueError`` if the
    environment does not say where the store is.
    """
    store, rank, size = next(rendezvous('env://', timeout=timedelta(seconds=timeout)))
    deadline = time.monotonic() + timeout
    # entries of two starts differ, even if they tell the same
    entry = pickle.dumps((secrets.token_bytes(16), own))
    store.set(entry_key(rank), entry)
    name, entries = publish_rounds(store, size, deadline) if rank == 0 else join_round(store, rank, entry, deadline)
    shared = PrefixStore(name, store)
    shared.add('read', 1)
    if rank == 0:
        wait_for_count(shared, 'read', size)
    return Meeting(shared, [pickle.loads(each)[1] for each in entries])


def entry_key(rank: int) -> str:
    return f'x-transformers/{rank}'


def publish_rounds(store: Store, size: int, deadline: float) -> tuple[str, list[bytes]]:
    """The part of the main process. Returns (name of the round, its entries)."""
    name, entries = '', list[bytes]()
    while True:
        newest = [store.get(entry_key(rank)) for rank in range(size)]
        if newest != entries:
            name, entries = f'x-transformers/{secrets.token_hex(8)}', newest
            store.set(f'{name}/entries', pickle.dumps(entries))  # type: ignore[arg-type]  # bytes are as good
            store.set(ROUND, name)
        if size == 1 or store.check([f'{name}/{rank}' for rank in range(1, size)]):
            store.set(f'{name}/complete', '')
            return name, entries
        wait(deadline)


def join_round(store: Store, rank: int, entry: bytes, deadline: float) -> tuple[str, list[bytes]]:
    """The part of the other processes. Returns the same."""
    name, entries = '', list[bytes]()
    while True:
        newest = store.get(ROUND).decode()
        if newest != name:
            name, entries = newest, pickle.loads(store.get(f'{newest}/entries'))
            if entries[rank] == entry:
                store.set(f'{name}/{rank}', '')
        if entries[rank] == entry and store.check([f'{name}/complete']):
            return name, entries
        wait(deadline)


def wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError('not all processes have come in time')
    time.sleep(PAUSE)


def wait_for_count(store: Store, key: str, size: int) -> None:
    """Wait a little until all have counted under ``key``. The main process may hold the store, so it must not end before."""
    deadline = time.monotonic() + PATIENCE
    while store.add(key, 0) < size and time.monotonic() < deadline:
        time.sleep(PAUSE)
