"""Checkpoints of a run: written and loaded atomically; older ones are removed.

A run folder holds ``config.json``, ``model.safetensors`` (the newest weights for use), ``metrics.jsonl`` and folders
``checkpoint-NNNNNNNN`` with everything needed to go on. Such a folder is written under a temporary name, brought to disk, and
renamed; only then is an older one removed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.utils._pytree import tree_map

from x_transformers.tensor_types import StateDict
from x_transformers.training.errors import CheckpointError
from x_transformers.training.files import (
    BEST,
    EXPORT,
    MANIFEST,
    PARTS,
    PREFIX,
    STATE,
    UNFINISHED,
    WEIGHTS,
    digest,
    find_checkpoints,
    read_checked,
    read_json,
    reason,
    remove,
    sync_folder,
    weights_as_bytes,
    write_atomically,
    write_synced,
)


class Checkpoints:
    """The checkpoints of one run folder, written while training goes on.

    Args:
        run: the folder.
        keep: how many of the newest checkpoints stay.
        background: write in a thread; only copying the tensors stops training. A failure is then told by the next call.
    """

    def __init__(self, run: Path, keep: int = 1, background: bool = True) -> None:
        self.run = run
        self.keep = keep
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[Path] = []

    def save(self, step: int, weights: StateDict, state: Mapping[str, Any], export: StateDict) -> None:
        """Hand over everything needed to continue after ``step``; ``export`` are the weights for use."""
        self.wait()
        if not self.background:
            self._finished.append(save_checkpoint(self.run, step, weights, state, keep=self.keep, export=export))
            return
        own = {name: cpu_copy(tensor) for name, tensor in weights.items()}
        other = None if export is weights else {name: cpu_copy(tensor) for name, tensor in export.items()}
        held = tree_map(cpu_copy, dict(state))

        def write() -> None:
            try:
                path = save_checkpoint(self.run, step, own, held, keep=self.keep, export=other)
                self._finished.append(path)  # in two lines: the list may be another one by now
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name='checkpoint')
        self._thread.start()

    def finished(self) -> list[Path]:
        """Checkpoints completed since the last call.

        Errors: ``CheckpointError`` if the last one could not be written.
        """
        self._raise()
        found, self._finished = self._finished, []
        return found

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Errors: ``CheckpointError`` if it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def save_best(self, step: int, value: float, export: StateDict) -> None:
        """Weights that were better than all before, in a file of their own."""
        self.wait()
        write_atomically(self.run / BEST, weights_as_bytes(export, {'step': str(step), 'value': repr(value)}))


def cpu_copy(value: Any) -> Any:
    """A tensor's copy on the CPU, which later steps do not change; anything else as it is."""
    return value.detach().to('cpu', copy=True) if isinstance(value, Tensor) else value


def save_checkpoint(
    run: Path,
    step: int,
    weights: StateDict,
    state: Mapping[str, Any],
    *,
    keep: int = 1,
    export: StateDict | None = None,
) -> Path:
    """Write everything needed to continue after ``step``, drop all but the newest ``keep``, replace the weights for use.

    Errors: ``CheckpointError`` when it cannot be written; earlier checkpoints are then still there, complete.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    files = {WEIGHTS: weights_as_bytes(weights), STATE: buffer.getvalue()}
    if export is not None and export is not weights:
        files[EXPORT] = weights_as_bytes(export)
    manifest = {name: {'bytes': len(data), 'blake2b': digest(data)} for name, data in files.items()}
    files[MANIFEST] = json.dumps({'step': step, 'files': manifest}, indent=2).encode()

    target = run / f'{PREFIX}{step:08d}'
    temporary = run / f'{UNFINISHED}{target.name}'
    try:
        remove(temporary)
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        remove(target)
        os.rename(temporary, target)
        sync_folder(run)
    except OSError as error:
        remove(temporary)
        kept = find_checkpoints(run)
        rest = f'{kept[-1]} is complete and untouched' if kept else 'there is no earlier one'
        raise CheckpointError(f'the checkpoint of step {step} cannot be written to {run}: {reason(error)}; {rest}') from error
    for older in find_checkpoints(run)[:-keep]:
        remove(older)
    write_atomically(run / WEIGHTS, files.get(EXPORT, files[WEIGHTS]))
    return target


def publish(checkpoint: Path) -> None:
    """Bring the run's weights for use up to those of its newest checkpoint: a killed process may not have come so far."""
    source = checkpoint / EXPORT if (checkpoint / EXPORT).exists() else checkpoint / WEIGHTS
    target = checkpoint.parent / WEIGHTS
    try:
        data = source.read_bytes()
        if target.exists() and target.read_bytes() == data:
            return
    except OSError as error:
        raise CheckpointError(f'{source} cannot be read: {reason(error)}') from error
    write_atomically(target, data)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, weights, state) of one checkpoint.

    Errors: ``CheckpointError`` if a file is missing, shorter or otherwise not what was written.
    """
    if (path / PARTS).exists():
        from x_transformers.distributed.checkpoint import read_whole

        return read_whole(path)
    manifest = read_json(path / MANIFEST)
    try:
        step, expected = int(manifest['step']), dict(manifest['files'])
        data = {name: read_checked(path / name, expected[name]) for name in (WEIGHTS, STATE)}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path / MANIFEST} is not the manifest of a checkpoint ({error!r})') from error
    try:
        state = torch.load(io.BytesIO(data[STATE]), map_location='cpu', weights_only=True)
        return step, load_tensors(data[WEIGHTS]), state
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(f'{path} cannot be read by this version: {error}') from error
