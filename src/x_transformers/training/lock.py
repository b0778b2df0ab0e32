"""A lock: one process at a time in a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from x_transformers.training.errors import CheckpointError

LOCK = '.lock'


@contextmanager
def locked(run: Path, *, create: bool, wait: bool = False) -> Iterator[None]:
    """Inside, no other process can lock ``run``. The system lets go of the lock when a process dies.

    Another process that holds it is waited for (``wait``), or that is an error.

    A folder that was made here (``create``) and in which nothing was written is removed again.

    Errors: ``CheckpointError`` if another process works on the folder, or it cannot be made or written to.
    """
    if run.exists() and not run.is_dir():
        raise CheckpointError(f'--run-dir {run} is a file, not a folder')
    made = _make(run) if create else []
    if not run.is_dir():
        raise CheckpointError(f'{run}: there is no such run folder')
    path = run / LOCK
    try:
        handle = _acquire(path, run, wait)
        try:
            yield
        finally:
            if os.name == 'nt':  # an open file cannot be removed there
                os.close(handle)
                path.unlink(missing_ok=True)
            else:
                path.unlink(missing_ok=True)
                os.close(handle)
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _make(run: Path) -> list[Path]:
    """The folders that did not exist, innermost first."""
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f'--run-dir {run} cannot be made: {error.strerror or error}') from error
    return missing


def _acquire(path: Path, run: Path, wait: bool) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f'--run-dir {run} cannot be written to: {error.strerror or error}') from error
        if not _lock(handle, wait):
            os.close(handle)
            raise CheckpointError(
                f'--run-dir {run} must not be in use, but another process is working on it. '
                'Wait for it, stop it, or choose another folder.'
            )
        # whoever held the lock before may have removed the file after we opened it: then the lock guards nothing
        try:
            current = path.stat()
        except FileNotFoundError:
            current = None
        if current is not None and os.path.samestat(current, os.fstat(handle)):
            return handle
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    try:
        if os.name == 'nt':
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
