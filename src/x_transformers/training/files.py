"""Atomic replacement of files, and the names of the files of a run folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from x_transformers.tensor_types import StateDict
from x_transformers.training.errors import CheckpointError

PREFIX = 'checkpoint-'
UNFINISHED = '.unfinished-'
WEIGHTS = 'model.safetensors'
STATE = 'state.pt'
EXPORT = 'export.safetensors'  # the weights for use, where they are not those that training goes on with
BEST = 'best.safetensors'
MANIFEST = 'manifest.json'
PARTS = '.metadata'  # there where several processes have written a checkpoint in parts


# single files


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; when that fails (disk full, say) the old file stays as it was."""
    temporary = path.with_name(f'{UNFINISHED}{path.name}')
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise CheckpointError(f'{path} cannot be written: {reason(error)}; what was there before is untouched') from error


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + '\n').encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {reason(error)}') from error
    except ValueError as error:
        raise CheckpointError(f'{path} is not valid JSON: {error}') from error


def write_weights(path: Path, state: StateDict) -> None:
    write_atomically(path, weights_as_bytes(state))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a truncated one is refused."""
    try:
        return load_tensors(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {reason(error)}') from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f'{path} is truncated or not a safetensors file ({error})') from error


def weights_as_bytes(state: StateDict, metadata: dict[str, str] | None = None) -> bytes:
    """The safetensors form; tensors that share memory (tied weights) are written once per name."""
    tensors = {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in state.items()}
    return save_tensors(tensors, metadata)


def find_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What a killed process left half written has another name."""
    return sorted(path for path in run.glob(f'{PREFIX}*') if path.is_dir())


# what is on disk, and whether it is what was written


def read_checked(path: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {reason(error)}') from error
    if len(data) != expected['bytes']:
        raise CheckpointError(
            f'{path} is truncated: {len(data):,} bytes where {expected["bytes"]:,} were written; '
            'remove its folder to start again from an earlier checkpoint or from the beginning'
        )
    if digest(data) != expected['blake2b']:
        raise CheckpointError(f'{path} is damaged: its checksum is not the one that was written; remove its folder')
    return data


def entry_of(path: Path) -> dict[str, Any]:
    """The size and checksum of a file, which need not fit into memory."""
    total = hashlib.blake2b(digest_size=16)
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 24):
            total.update(chunk)
    return {'bytes': path.stat().st_size, 'blake2b': total.hexdigest()}


def check_entry(path: Path, expected: Mapping[str, Any]) -> None:
    """Errors: ``CheckpointError`` for a file that is not what was written."""
    try:
        found = entry_of(path)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {reason(error)}') from error
    if found != dict(expected):
        raise CheckpointError(
            f'{path} is truncated or damaged: its size or checksum is not the one that was written; remove its folder to '
            'start again from an earlier checkpoint or from the beginning'
        )


def write_synced(path: Path, data: bytes) -> None:
    with open(path, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    if os.name != 'posix':  # only there can a folder be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def reason(error: OSError) -> str:
    return error.strerror or str(error)
