"""How processes that were started together find each other, and what each of them tells the others.

``torchrun --max-restarts`` keeps one store over all of its starts, so what lies there may be of processes that have died: their
addresses, too, which PyTorch itself would take for those of the living. Its count of restarts does not tell starts apart: each
node counts the failures of its own processes.
"""

from __future__ import annotations

import pickle
import secrets
import time
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

CALLED = 'x-transformers/called'  # the name of those that the main process has found
PAUSE = 0.01  # seconds
PATIENCE = 3.0  # seconds, of the ten in which all are to end


class Meeting(NamedTuple):
    store: Store  # of these processes alone
    told: list[Any]  # by each of them, in the order of their numbers


def meet(own: Any = None, *, timeout: float) -> Meeting:
    """Wait until all processes are there.

    The main process gives a name to those that it finds. Whoever finds itself among them says so, and what it finds of others
    that have died is given another name as soon as those that are alive have come.

    Args:
        own: what this process tells; it is pickled.
        timeout: seconds.

    Errors: ``torch.distributed.DistError`` or ``TimeoutError`` if not all come in time, ``ValueError`` if it was not said where
    they meet.
    """
    store, rank, size = next(rendezvous('env://', timeout=timedelta(seconds=timeout)))
    deadline = time.monotonic() + timeout
    # no two are alike, whatever they tell
    mine = pickle.dumps((secrets.token_bytes(16), own))
    store.set(of(rank), mine)
    name, told = find_all(store, size, deadline) if rank == 0 else be_found(store, rank, mine, deadline)
    store.add(f'{name}/read', 1)
    # the main process may hold the store, which the others are still to ask
    until = time.monotonic() + PATIENCE
    while rank == 0 and store.add(f'{name}/read', 0) < size and time.monotonic() < until:
        time.sleep(PAUSE)
    return Meeting(PrefixStore(name, store), [pickle.loads(each)[1] for each in told])


def of(rank: int) -> str:
    return f'x-transformers/{rank}'


def find_all(store: Store, size: int, deadline: float) -> tuple[str, list[bytes]]:
    """What the main process does: (their name, what they tell)."""
    name, told = '', list[bytes]()
    while True:
        found = [store.get(of(rank)) for rank in range(size)]
        if found != told:
            name, told = f'x-transformers/{secrets.token_hex(8)}', found
            store.set(f'{name}/told', pickle.dumps(told))  # type: ignore[arg-type]  # bytes are as good
            store.set(CALLED, name)
        if size == 1 or store.check([f'{name}/{rank}' for rank in range(1, size)]):
            store.set(f'{name}/all', '')
            return name, told
        wait(deadline)


def be_found(store: Store, rank: int, mine: bytes, deadline: float) -> tuple[str, list[bytes]]:
    """What the others do: the same."""
    name, told = '', list[bytes]()
    while True:
        found = store.get(CALLED).decode()
        if found != name:
            name, told = found, pickle.loads(store.get(f'{found}/told'))
            if told[rank] == mine:
                store.set(f'{name}/{rank}', '')
        if told[rank] == mine and store.check([f'{name}/all']):
            return name, told
        wait(deadline)


def wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError('not all processes have come in time')
    time.sleep(PAUSE)
