"""``torchrun`` as people start it: what its processes say, how they end, and which of them is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.two_processes import free_port

# lines that are torchrun's own, not ours: its log, and what it tells of the processes that have failed
OURS = 'x-transformers: '


class Ended(NamedTuple):
    """What became of a start of the command."""

    status: int
    said: list[str]  # our sentences
    output: str
    traced: bool  # whether there is a traceback of ours, and not of torchrun alone
    seconds: float  # from the first of our sentences, or the signal, until all ranks had ended


class Started:
    """``torchrun --nproc-per-node N -m x_transformers …``, or without it one process.

    Args:
        own: options that a process of this rank has beside the others.
        restarts: how often torchrun starts all processes again when one of them has failed.
        among: options by which this torchrun finds those of other nodes; ``world`` is then what it starts itself.
    """

    def __init__(
        self,
        arguments: list[str],
        world: int,
        log: Path,
        own: dict[int, list[str]] | None = None,
        module: str = 'x_transformers',
        restarts: int = 0,
        among: Sequence[str] = (),
    ) -> None:
        env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
        command = [sys.executable, '-m', module, *arguments]
        if own:
            cases = ' '.join(f'{rank}) set -- "$@" {" ".join(more)};;' for rank, more in own.items())
            command = ['bash', '-c', f'case $RANK in {cases} esac; exec "$@"', 'started', *command]
        if world > 1 or among:
            run = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(world)]
            run += ['--max-restarts', str(restarts), *(among or ('--master-port', str(free_port())))]
            command = [*run, '--no-python', *command]
        self.log = log
        log.unlink(missing_ok=True)
        # each writes behind the others
        with open(log, 'ab') as out:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.since = 0.0

    def processes(self) -> dict[int, int]:
        """Ranks and their process ids."""
        found = {}
        for folder in Path('/proc').glob('[0-9]*'):
            try:
                parent = int((folder / 'stat').read_text().rsplit(')', 1)[1].split()[1])
                told = (folder / 'environ').read_bytes().split(b'\0')
            except OSError:
                continue
            if parent == self.process.pid:
                ranks = [int(each.removeprefix(b'RANK=')) for each in told if each.startswith(b'RANK=')]
                found |= {rank: int(folder.name) for rank in ranks}
        return found

    def signal(self, number: int, *ranks: int) -> None:
        self.since = time.monotonic()
        own = self.processes()
        for rank in ranks or (None,):
            os.kill(self.process.pid if rank is None else own[rank], number)

    def until(self, found: Callable[[], Any], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < deadline, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def output(self) -> str:
        return self.log.read_text(encoding='utf-8', errors='replace').replace('\r', '\n')

    def ended(self, seconds: float = 300) -> Ended:
        deadline, said, gone = time.monotonic() + seconds, self.since, 0.0
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                for pid in self.processes().values():
                    os.kill(pid, signal.SIGKILL)
                self.process.kill()
                raise AssertionError(f'still running after {seconds} seconds: {self.output()}')
            if not said and OURS in self.output():
                said = time.monotonic()
            if said and not gone and not self.processes():
                gone = time.monotonic()  # what torchrun then tells takes some time
            time.sleep(0.02)
        text = self.output()
        lines = [line for line in text.splitlines() if line.startswith(OURS)]
        took = (gone or time.monotonic()) - said if said else 0.0
        traced = re.search('File ".*x_transformers', text) is not None
        return Ended(self.process.returncode, lines, text, traced, took)
