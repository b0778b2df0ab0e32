"""One training run: its options, the folder named by their hash, its result.

A run is done when ``result.json`` is there, which is written last and under its name at once. Whoever works on a run holds a
lock of the operating system on its folder, which ends with the process, however it ends: several processes share a folder, and
a killed one leaves nothing behind that stands in the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from x_transformers.training.errors import TrainingError
from x_transformers.training.options import TrainerOptions

FORMAT = 1
RESULT, FAILED, OPTIONS, LOCK = 'result.json', 'failed.json', 'options.json', 'lock'


@dataclass(frozen=True)
class Settings:
    """How a task is trained: the same for all arms."""

    steps: int
    lr: float
    optimizer: Literal['adamw', 'muon'] = 'adamw'
    weight_decay: float = 0.1
    warmup: int = 20
    clip: float = 1.0
    schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
    evaluations: int = 10
    """Evaluations at about even distances; two more stand shortly before the end, for the mean of the last three."""
    mup: bool = False
    """Rates and starts by the rules of μP (https://arxiv.org/abs/2203.03466), for ``lr`` as it was tuned at ``mup_base``."""
    mup_base: int = 256

    def check(self) -> None:
        wrong = self.trainer_options().faults()
        if not wrong and self.lr == 0:
            wrong.append('lr must be above 0, got 0. Take 1e-3.')
        if not isinstance(self.evaluations, int) or self.evaluations < 1:
            wrong.append(f'evaluations must be a whole number of at least 1, got {self.evaluations!r}. Take 10.')
        if wrong:
            raise TrainingError('\n'.join(wrong))

    def trainer_options(self, **more: Any) -> TrainerOptions:
        """The same in the words of the trainer, without the evaluations."""
        return TrainerOptions(**{name: value for name, value in asdict(self).items() if name != 'evaluations'}, **more)

    def written(self) -> dict[str, Any]:
        """What the hash of a run is made of: μP stands in it where it is on, as older runs know nothing of it."""
        return {name: value for name, value in asdict(self).items() if self.mup or not name.startswith('mup')}

    @property
    def unit(self) -> int:
        """Evaluations stand at multiples of so many steps, and at the end."""
        return max(1, self.steps // (4 * self.evaluations))

    def evaluated(self) -> list[int]:
        """The numbers of finished steps after which a run is evaluated."""
        multiples = range(self.unit, self.steps, self.unit)
        return sorted({step for step in multiples if step % (4 * self.unit) == 0} | set(multiples[-2:]) | {self.steps})


@dataclass(frozen=True)
class TaskName:
    """A task as it is written down: its name or Python path, and options that differ from its own."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed."""

    task: TaskName
    flags: Mapping[str, Any]
    settings: Settings
    seed: int
    device: str = 'cpu'
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the task says of itself: part of the hash, so that changed data are never mistaken for the same."""

    def options(self) -> dict[str, Any]:
        return {
            'format': FORMAT,
            'task': dict(self.identity),
            'flags': dict(self.flags),
            'settings': self.settings.written(),
            'seed': self.seed,
        }

    @property
    def hash(self) -> str:
        return hash_of(self.options())


@dataclass(frozen=True)
class CostRun:
    """The time of a step, baseline and arm in turns, with parameters, operations and memory."""

    task: TaskName
    base: Mapping[str, Any]
    flags: Mapping[str, Any]
    settings: Settings
    steps: int = 30
    device: str = 'cpu'
    identity: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        return {
            'format': FORMAT,
            'cost of': dict(self.flags),
            'beside': dict(self.base),
            'task': dict(self.identity),
            'steps': self.steps,
            'lr': self.settings.lr,
            'device': self.device,
        }

    @property
    def hash(self) -> str:
        return hash_of(self.options())


# settings that an idea may have of its own, as it has flags; all others are the same for every arm
OF_IDEAS = ('lr', 'weight_decay', 'warmup', 'clip', 'schedule', 'mup', 'mup_base')
OF_ALL = ('steps', 'optimizer', 'evaluations')


def refuse_common(arm: str, flags: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """What all arms must have in common is no idea."""
    wrong = [name for name in OF_ALL if name in flags and name not in base]
    if wrong:
        ways = ', '.join(f'--{name}' for name in wrong)
        raise TrainingError(f'{", ".join(wrong)} must be the same for all arms, got another value in {arm}. Give {ways}.')


Job = ArmRun | CostRun


def hash_of(options: Mapping[str, Any]) -> str:
    text = json.dumps(options, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Errors: ``TrainingError`` for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        why = f'{folder}: {error.strerror or error}'
        raise TrainingError(f'--out must be a folder that can be written, got {why}. Choose another one.') from error


class RunFolder:
    """The runs of a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, job: Job) -> Path:
        return self.folder / 'runs' / job.hash

    def result(self, job: Job) -> dict[str, Any] | None:
        return read_record(self.path(job) / RESULT)

    def failure(self, job: Job) -> dict[str, Any] | None:
        """Why a run failed, unless it has been done since."""
        return None if self.result(job) is not None else read_record(self.path(job) / FAILED)

    def settled(self, job: Job) -> bool:
        return (self.path(job) / RESULT).exists() or (self.path(job) / FAILED).exists()

    def write_result(self, job: Job, result: Mapping[str, Any]) -> None:
        write_record(self.path(job) / RESULT, result)
        with contextlib.suppress(FileNotFoundError):
            (self.path(job) / FAILED).unlink()

    def write_failure(self, job: Job, why: str) -> None:
        write_record(self.path(job) / FAILED, {'why': why})

    def forget_failure(self, job: Job) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path(job) / FAILED).unlink()

    @contextlib.contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Whether this process may work on the run: nobody else does, as long as this context is open."""
        path = self.path(job)
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            mine = lock(handle)
            if mine and not (path / OPTIONS).exists():
                write_record(path / OPTIONS, job.options())
            yield mine
        finally:
            os.close(handle)  # which also gives the lock back


def lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks here: work is shared by --shard only
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f'{path} cannot be read: {error}. Delete it to do the run again.') from error
    return found if isinstance(found, dict) else None


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Under its name at once: whoever reads sees nothing or all of it."""
    write_text(path, json.dumps(value, default=list) + '\n')


def write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
