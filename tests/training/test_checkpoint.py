from __future__ import annotations

import os

import pytest
import torch

from x_transformers.training import checkpoint
from x_transformers.training.checkpoint import load_checkpoint, save_checkpoint
from x_transformers.training.errors import CheckpointError
from x_transformers.training.files import STATE, WEIGHTS, find_checkpoints, read_weights, write_atomically


def save(run, step):
    return save_checkpoint(run, step, {'w': torch.full((3,), float(step))}, {'step': step, 'more': [(1, 2), {'a': None}]})


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    step, weights, state = load_checkpoint(path)
    assert step == 7
    assert weights['w'].tolist() == [7.0] * 3
    assert state == {'step': 7, 'more': [(1, 2), {'a': None}]}
    assert read_weights(tmp_path / WEIGHTS)['w'].tolist() == [7.0] * 3


def test_only_the_newest_is_kept_and_nothing_is_left_behind(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [path.name for path in find_checkpoints(tmp_path)] == ['checkpoint-00000010']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint-00000010', WEIGHTS]


@pytest.mark.parametrize('name', [WEIGHTS, STATE])
def test_truncated_and_damaged_files_are_refused(tmp_path, name):
    path = save(tmp_path, 1) / name
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match=rf'{name} is truncated: .* bytes where'):
        load_checkpoint(path.parent)
    path.write_bytes(data[:-5] + bytes(5 * [7]))
    with pytest.raises(CheckpointError, match='damaged'):
        load_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match='cannot be read'):
        load_checkpoint(path.parent)


def test_truncated_weights_are_refused(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match='truncated'):
        read_weights(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    before = save(tmp_path, 3)
    content = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:  # the second file of the new checkpoint
            raise OSError(28, 'No space left on device')
        real(handle)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(CheckpointError, match=r'step 4 cannot be written .* No space left on device; .*00000003 is complete'):
        save(tmp_path, 4)
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == content
    monkeypatch.undo()
    assert load_checkpoint(before)[0] == 3
    save(tmp_path, 4)
    assert [path.name for path in find_checkpoints(tmp_path)] == ['checkpoint-00000004']


def test_a_kill_between_writing_and_renaming_is_not_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 3)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint.os, 'rename', die)
    with pytest.raises(Killed):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert [path.name for path in find_checkpoints(tmp_path)] == ['checkpoint-00000003']
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint-00000004', WEIGHTS]


def test_single_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    write_atomically(path, b'old')

    def full(handle):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(CheckpointError, match='No space left on device'):
        write_atomically(path, b'new and longer')
    assert path.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['file']
