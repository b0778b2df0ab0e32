"""Loggers beside a run's own file: TensorBoard, trackio and wandb, with three functions each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from x_transformers.training.errors import TrainingError


class Log(Protocol):
    def figures(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self.board = _needed('torch.utils.tensorboard', 'tensorboard').SummaryWriter(str(run / 'tensorboard'))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.board.add_text(name, text, step)

    def close(self) -> None:
        self.board.close()


class _Tracker:
    """trackio has the calls of wandb."""

    package: str

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self.tracker = _needed(self.package, self.package)
        self.tracker.init(project='x-transformers', name=run.name, config=dict(settings))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.tracker.log({name: text}, step=step)

    def close(self) -> None:
        self.tracker.finish()


class Trackio(_Tracker):
    package = 'trackio'


class Wandb(_Tracker):
    package = 'wandb'


LOGS: dict[str, type[TensorBoard] | type[_Tracker]] = {'tensorboard': TensorBoard, 'trackio': Trackio, 'wandb': Wandb}
MODULES = {'tensorboard': 'torch.utils.tensorboard', 'trackio': 'trackio', 'wandb': 'wandb'}


def check_logs(names: tuple[str, ...]) -> None:
    """Errors: ``TrainingError`` if the package of one of them is not installed."""
    for name in names:
        _needed(MODULES[name], name)


def open_logs(names: tuple[str, ...], run: Path, settings: Mapping[str, Any]) -> list[Log]:
    return [LOGS[name](run, settings) for name in names]


def _needed(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TrainingError(f'--log {name} needs the package {name}. Install it: pip install {name}') from error
