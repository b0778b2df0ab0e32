"""The show: ``torchrun`` trains, a process is killed, the run goes on in one process, and back on several."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.torchrun import Started
from tests.two_processes import free_port

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='processes are found in /proc'),
    pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed'),
]

SMALL = [
    '--dim', '32', '--depth', '2', '--heads', '2', '--attn-dim-head', '16', '--seq-len', '64', '--batch', '4',
    '--val-bytes', '500', '--final-bytes', '1000', '--sample-length', '10', '--warmup', '3', '--save-every', '4',
    '--threads', '1',
]  # fmt: skip
STEPS = 64
GRIDS = {
    '--shard none': 2,
    '--shard full': 2,
    '--shard full --tensor 2': 4,
}


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def saved(run: Path) -> int:
    return max((int(path.name.removeprefix('checkpoint-')) for path in run.glob('checkpoint-*')), default=0)


@pytest.mark.parametrize('grid', GRIDS)
def test_a_killed_run_goes_on_in_one_process_and_back(tmp_path: Path, grid: str) -> None:
    """Bit for bit on the same grid; on another the loaded state, and the next losses to a thousandth."""
    text, world = tmp_path / 'text', GRIDS[grid]
    text.write_text('the cat sat on the mat, the dog ran. ' * 1000, encoding='utf-8')

    def start(run: str, world: int, *more: str) -> Started:
        again = ['--resume'] if (tmp_path / run / 'config.json').exists() else [*SMALL, '--steps', str(STEPS), *grid.split()]
        return Started(['train', '--data', str(text), '--run-dir', str(tmp_path / run), *again, *more], world, tmp_path / 'log')

    def killed(run: str, world: int, step: int) -> int:
        """The step that is saved when a process is killed."""
        started = start(run, world)
        started.until(lambda: saved(tmp_path / run) >= step)
        started.signal(signal.SIGKILL, *([world - 1] if world > 1 else []))
        found = started.ended()
        assert found.status != 0
        assert found.seconds < 10, found
        assert len(found.said) == (world > 1), found.output
        assert not found.said or 'start all of them again with --resume' in found.said[0]
        assert not found.traced, found.output
        at = saved(tmp_path / run)
        assert step <= at < STEPS
        return at

    whole = start('whole', world).ended()
    assert whole.status == 0, whole.output
    # the same grid
    killed('same', world, 8)
    assert start('same', world).ended().status == 0
    mine, want = losses(tmp_path / 'same'), losses(tmp_path / 'whole')
    assert len(want) == STEPS
    assert mine == want
    published = [(tmp_path / run / 'model.safetensors').read_bytes() for run in ('same', 'whole')]
    assert published[0] == published[1]
    # another one, and back
    first = killed('other', world, 8)
    assert_loaded(tmp_path / 'other', 1, tmp_path)
    second = killed('other', 1, first + 20)
    assert_loaded(tmp_path / 'other', world, tmp_path)
    last = start('other', world).ended()
    assert last.status == 0, last.output
    mine = losses(tmp_path / 'other')
    assert mine.keys() == want.keys()
    assert all(mine[step] == want[step] for step in range(1, first + 1))
    for begin in (first, second):
        for step in range(begin + 1, min(begin + 20, STEPS) + 1):
            assert abs(mine[step] - want[step]) <= 1e-3 * want[step], (step, mine[step], want[step])


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """The same command again, with nobody at the keyboard: it goes on from its last checkpoint to the same losses."""
    text = tmp_path / 'text'
    text.write_text('the cat sat on the mat, the dog ran. ' * 1000, encoding='utf-8')

    def start(run: str) -> Started:
        given = ['train', '--data', str(text), *SMALL, '--steps', str(STEPS), '--shard', 'full', '--auto-resume']
        return Started([*given, '--run-dir', str(tmp_path / run)], 2, tmp_path / 'log', restarts=1)

    whole = start('whole').ended()
    assert whole.status == 0, whole.output
    assert 'resuming' not in whole.output
    started = start('killed')
    started.until(lambda: saved(tmp_path / 'killed') >= 8)
    before = started.processes()
    started.signal(signal.SIGKILL, 1)
    found = started.ended()
    assert found.status == 0, found.output
    assert before.keys() == {0, 1}
    at = re.findall(rf'resuming .* after step (\d+) of {STEPS}', found.output)
    assert len(at) == 1, found.output
    assert 8 <= int(at[0]) < STEPS
    assert not found.traced, found.output
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    published = [(tmp_path / run / 'model.safetensors').read_bytes() for run in ('killed', 'whole')]
    assert published[0] == published[1]


def test_nodes_that_count_their_starts_apart_go_on_together(tmp_path: Path) -> None:
    """The torchrun of a killed process counts a failure, and that of another node may count none."""
    text = tmp_path / 'text'
    text.write_text('the cat sat on the mat, the dog ran. ' * 1000, encoding='utf-8')
    among = ['--nnodes', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{free_port()}', '--rdzv-id', 'both']
    given = ['train', '--data', str(text), *SMALL, '--steps', str(STEPS), '--shard', 'full', '--auto-resume']
    given += ['--run-dir', str(tmp_path / 'run')]
    both = [Started(given, 1, tmp_path / f'log{node}', restarts=1, among=among) for node in range(2)]
    both[0].until(lambda: saved(tmp_path / 'run') >= 8)
    (other,) = (node for node in both if 1 in node.processes())
    other.signal(signal.SIGKILL, 1)
    found = [node.ended() for node in both]
    assert [each.status for each in found] == [0, 0], found
    said = [line for each in found for line in each.said]
    assert all('has lost another one' in line for line in said), said
    assert sum(each.output.count('resuming') for each in found) == 1
    assert len(losses(tmp_path / 'run')) == STEPS


def assert_loaded(run: Path, world: int, folder: Path) -> None:
    """Whether weights and the optimizer's state are, bit for bit, those of the checkpoint, however many processes read it."""
    found = Started([str(run)], world, folder / 'loaded', module='tests.distributed.loaded').ended()
    assert found.status == 0, found.output
    assert found.output.count('bit for bit') == world, found.output
