"""The command on two processes: resumed on one and back, stopped by a signal, one process killed, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.two_processes import free_port

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed'),
]

SMALL = [
    '--dim', '16', '--depth', '2', '--heads', '2', '--attn-dim-head', '8', '--attn-kv-heads', '1', '--seq-len', '32', '--batch',
    '4', '--val-every', '50', '--val-bytes', '200', '--final-bytes', '300', '--sample-length', '5', '--warmup', '1',
]  # fmt: skip


def launch(arguments: list[str], world: int = 2, **per_rank: list[str]) -> list[subprocess.Popen[str]]:
    """What torchrun does: one process for each rank, with its variables; of four there are two on each node."""
    started, port, local = [], str(free_port()), min(world, 2)
    for rank in range(world):
        env = os.environ | {'OMP_NUM_THREADS': '1'}
        if world > 1:
            env |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port, 'WORLD_SIZE': str(world), 'LOCAL_WORLD_SIZE': str(local)}
            env |= {'RANK': str(rank), 'LOCAL_RANK': str(rank % local)}
        command = [sys.executable, '-m', 'x_transformers', *arguments, *per_rank.get(f'rank{rank}', [])]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def ended(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str]]:
    """(exit status, what was said on stderr) of each."""
    return [(process.wait(timeout), err) for process in processes for _, err in [process.communicate(timeout=timeout)]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / 'text'
    path.write_text('the cat sat on the mat, the dog ran. ' * 400, encoding='utf-8')
    return path


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def until(found: object, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def test_a_run_changes_its_processes(tmp_path: Path, text: Path) -> None:
    run = tmp_path / 'run'
    given = ['train', '--data', str(text), '--run-dir', str(run)]
    # a schedule without an end, so that a longer run has the same rates
    first = ended(launch([*given, *SMALL, '--steps', '3', '--shard', 'full', '--schedule', 'constant']))
    assert [status for status, _ in first] == [0, 0], first
    then = ended(launch(['train', '--run-dir', str(run), '--resume', '--steps', '5', '--data', str(text)], world=1))
    assert then[0][0] == 0, then
    more = ['--resume', '--steps', '7', '--shard', 'none', '--tensor', '2', '--sequence-parallel', '--loss-parallel']
    last = ended(launch(['train', '--run-dir', str(run), *more, '--data', str(text)]))
    assert [status for status, _ in last] == [0, 0], last
    staged = ['--tensor', '1', '--no-sequence-parallel', '--no-loss-parallel', '--pipeline', '2']
    for steps, grid in (('9', staged), ('11', ['--pipeline', '1'])):
        world = 2 if '2' in grid else 1
        then = ended(launch(['train', '--run-dir', str(run), '--resume', '--steps', steps, *grid, '--data', str(text)], world))
        assert {status for status, _ in then} == {0}, then
    whole = tmp_path / 'whole'
    same = ended(
        launch(
            ['train', '--data', str(text), '--run-dir', str(whole), *SMALL, '--steps', '11', '--shard', 'full', '--schedule',
             'constant']
        )
    )  # fmt: skip
    assert [status for status, _ in same] == [0, 0], same
    mine, want = losses(run), losses(whole)
    assert mine.keys() == want.keys() == set(range(1, 12))
    for step, loss in want.items():
        assert abs(mine[step] - loss) <= 1e-3 * loss, (step, mine[step], loss)


# how many processes train on each grid
GRIDS = {
    '--shard full': 2,
    '--shard none': 2,
    '--shard hybrid': 4,
    '--tensor 2': 2,
    '--tensor 2 --sequence-parallel --loss-parallel': 2,
    '--shard full --tensor 2': 4,
    '--context 2': 2,
    '--context 2 --shard full': 2,
    '--pipeline 2 --grad-accum 2': 2,
}


@pytest.mark.parametrize('typed', GRIDS)
def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path: Path, text: Path, typed: str) -> None:
    """SIGTERM, then kill -9 of a process, then one that does not answer: each time all end, and nothing is lost."""
    run, grid, world = tmp_path / 'run', typed.split(), GRIDS[typed]
    given = ['train', '--data', str(text), *SMALL, '--schedule', 'constant', '--save-every', '2', '--ema', '0.9', *grid]
    resumed = ['train', '--run-dir', str(run), '--resume', '--data', str(text)]
    processes = launch([*given, '--run-dir', str(run), '--steps', '100000'], world)
    until(lambda: list(run.glob('checkpoint-*')), processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [status for status, _ in found] == [143] * world, found
    assert [said.count('everything is saved') for _, said in found] == [1] + [0] * (world - 1)

    for number, (what, victim) in enumerate(
        ((signal.SIGKILL, world - 1), (signal.SIGKILL, 0), (signal.SIGSTOP, world - 1), (signal.SIGSTOP, 0))
    ):
        (saved,) = run.glob('checkpoint-*')
        processes = launch([*resumed, '--timeout', '6'], world)
        until(lambda saved=saved: not saved.exists() and list(run.glob('checkpoint-*')), processes)
        processes[victim].send_signal(what)
        began = time.monotonic()
        found = ended([process for rank, process in enumerate(processes) if rank != victim])
        assert time.monotonic() - began < (10 if what == signal.SIGKILL else 25), (number, found)
        processes[victim].kill()
        ended([processes[victim]])
        assert {status for status, _ in found} == {1}, found
        sentences = [line for _, said in found for line in said.splitlines() if line.startswith('x-transformers:')]
        assert len(sentences) == 1, found
        assert 'start all of them again with --resume' in sentences[0]
    (newest,) = run.glob('checkpoint-*')
    steps = str(int(newest.name.removeprefix('checkpoint-')) + 2)

    again = ended(launch([*resumed, '--steps', steps], world))
    assert [status for status, _ in again] == [0] * world, again
    whole = tmp_path / 'whole'
    same = ended(launch([*given, '--run-dir', str(whole), '--steps', steps], world))
    assert [status for status, _ in same] == [0] * world, same
    mine, want = losses(run), losses(whole)
    assert mine.keys() == want.keys() == set(range(1, int(steps) + 1))
    assert mine == want
    assert (run / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('typed', GRIDS)
def test_a_loss_that_is_no_number_ends_all(tmp_path: Path, text: Path, typed: str) -> None:
    run, grid, world = tmp_path / 'run', typed.split(), GRIDS[typed]
    given = ['train', '--data', str(text), *SMALL, '--run-dir', str(run), '--steps', '40', '--save-every', '1', *grid]
    found = ended(launch([*given, '--lr', '1e18', '--muon-lr', '1e18', '--warmup', '0', '--clip', '0'], world))
    assert [status for status, _ in found] == [2] * world, found
    said = [line for _, err in found for line in err.splitlines() if line.startswith('x-transformers:')]
    assert len(said) == 1, said
    assert 'the learning rate (--lr 1e+18, --muon-lr 1e+18) may be too high' in said[0]


def test_bad_input_is_one_sentence(tmp_path: Path, text: Path) -> None:
    run = tmp_path / 'run'
    given = ['train', '--data', str(text), '--run-dir', str(run), *SMALL, '--steps', '2']
    began = time.monotonic()
    torn = tmp_path / 'torn.jsonl'
    torn.write_text('{"text": "a"}\n{"text', encoding='utf-8')
    wrong = {
        'torn.jsonl, line 2 must be a JSON object': (['train', '--data', str(torn), *given[3:]], []),
        '--batch must be a multiple of 2': ([*given, '--batch', '3'], []),
        'same options, got others in process 1: lr': (given, ['--lr', '0.5']),
        'same options, got others in process 1: tensor': (given, ['--tensor', '2']),
        'process 1 says: --batch must be a multiple of 2': (given, ['--batch', '3']),
        'process 1 says: there is no option --nonsense': (given, ['--nonsense', '3']),
        '--device cuda:0 cannot be used here' if not torch.cuda.is_available() else '--batch': (
            [*given, *(['--device', 'cuda'] if not torch.cuda.is_available() else ['--batch', '3'])],
            [],
        ),
        'the number of heads must be a multiple of --tensor 2, got 3': ([*given, '--tensor', '2', '--heads', '3'], []),
        '`attn_dropout` must be left as it is with tensor': ([*given, '--tensor', '2', '--attn-dropout', '0.1'], []),
        'must be a multiple of 3': ([*given, '--tensor', '3'], []),
        '--sequence-parallel must go with --tensor 2 or more, got 1': ([*given, '--sequence-parallel'], []),
        'must be a multiple of 3 (pipeline 3), got 2': ([*given, '--pipeline', '3'], []),
        '--pipeline must be at most 1, the number of blocks': ([*given, '--pipeline', '2', '--depth', '1'], []),
        '`layer_dropout` must be left as it is with pipeline': ([*given, '--pipeline', '2', '--layer-dropout', '0.1'], []),
    }
    for sentence, (arguments, own) in wrong.items():
        found = ended(launch(arguments, rank1=own))
        assert [status for status, _ in found] == [2, 2], found
        said = [line for _, err in found for line in err.splitlines() if line.startswith('x-transformers:')]
        assert len(said) == 1, said
        assert sentence in said[0]
    assert time.monotonic() - began < 120 * len(wrong)
    assert not run.exists() or not any(run.iterdir())
