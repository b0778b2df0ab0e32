"""Errors with causes outside the program: shown as one sentence, without a traceback."""

from __future__ import annotations


class TrainingError(Exception):
    """A sentence for the person at the keyboard: what was wanted, what was found, the way out."""


class DataError(TrainingError):
    """The data cannot be read or do not suffice."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read."""


def last_line(error: BaseException) -> str:
    """What PyTorch says of a state that does not fit; above stands of which class."""
    return (str(error).splitlines() or [repr(error)])[-1].strip()
