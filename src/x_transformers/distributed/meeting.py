"""How processes that were started together find each other, and what each of them tells the others."""

from __future__ import annotations

import os
import pickle
import time
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PATIENCE = 3.0  # seconds, of the ten in which all are to end


class Meeting(NamedTuple):
    store: Store  # of the processes of this start alone
    told: list[Any]  # by each of them, in the order of their numbers


def meet(own: Any = None, *, timeout: float) -> Meeting:
    """Wait until all processes are there.

    ``torchrun --max-restarts`` may keep one store over all of its starts. What lies there may be of processes that have died,
    such as their addresses, which PyTorch would take for those of the living. Each start therefore has keys of its own.

    Args:
        own: what this process tells; it is pickled.
        timeout: seconds.

    Errors: ``torch.distributed.DistError`` if not all come in time, ``ValueError`` if it was not said where they meet.
    """
    shared, rank, size = next(rendezvous('env://', timeout=timedelta(seconds=timeout)))
    store = PrefixStore(f'x-transformers/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', shared)
    store.set(str(rank), pickle.dumps(own))  # type: ignore[arg-type]  # bytes are as good
    told = [pickle.loads(store.get(str(each))) for each in range(size)]
    store.add('read', 1)
    # the main process may hold the store, which the others are still to ask
    until = time.monotonic() + PATIENCE
    while rank == 0 and store.add('read', 0) < size and time.monotonic() < until:
        time.sleep(0.01)
    return Meeting(store, told)
