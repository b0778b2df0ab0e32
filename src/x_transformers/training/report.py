"""The report of a run: metrics, the picture of the loss, the comparison with compressors."""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x_transformers.drawing import BLUE, GREEN, GREY, RED, name_beside, panels, save_figure, style
from x_transformers.training.errors import CheckpointError
from x_transformers.training.files import write_atomically
from x_transformers.training.logs import Log
from x_transformers.training.trainer import Callback, Trainer

METRICS = 'metrics.jsonl'
PICTURE = 'loss.png'


class Metrics(Callback):
    """One JSON object per line: a training step, an evaluation, the final figures. The figures go to other logs, too."""

    def __init__(self, run: Path, bytes_per_token: float = 1.0, logs: Sequence[Log] = ()) -> None:
        self.path = run / METRICS
        self.bytes_per_token = bytes_per_token
        self.logs = logs

    def add(self, **values: Any) -> None:
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(values) + '\n')
        except OSError as error:
            raise CheckpointError(f'{self.path} cannot be written: {error.strerror or error}') from error
        figures = {name: value for name, value in values.items() if name != 'step' and isinstance(value, (int, float))}
        for log in self.logs:
            log.figures(values['step'], figures)

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record['bits_per_byte'] = record['loss'] / math.log(2) / self.bytes_per_token
        self.add(**record)

    def validated(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.add(**values)

    def close(self) -> None:
        for log in self.logs:
            log.close()

    def forget_after(self, step: int) -> None:
        """Drop what was written after ``step``, so that a resumed run does not tell it twice."""
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line['step'] <= step and 'final' not in line]
            write_atomically(self.path, ''.join(json.dumps(line) + '\n' for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last one may have been cut when the process was killed.

    Errors: ``CheckpointError`` for what is no text.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f'{path} must hold lines of JSON, got bytes that are no text. Move it away.') from error
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get('step'), int):
            lines.append(value)
    return lines


@dataclass(frozen=True)
class CompressorComparison:
    """The model and two compressors on the same bytes, in bits per byte."""

    size: int
    model: float
    gzip: float
    xz: float

    @classmethod
    def of(cls, data: bytes, model: float) -> CompressorComparison:
        return cls(
            len(data), model, 8 * len(gzip.compress(data, 9)) / len(data), 8 * len(lzma.compress(data, preset=9)) / len(data)
        )

    def __str__(self) -> str:
        rows = [
            f'on {self.size:,} held-out bytes, in bits per byte (less is better):',
            f'  this model  {self.model:.3f}',
            f'  gzip -9     {self.gzip:.3f}   the model needs {versus(self.model, self.gzip)}',
            f'  xz -9       {self.xz:.3f}   the model needs {versus(self.model, self.xz)}',
            'The model has read the training text, which the compressors have not; its own size is not counted.',
        ]
        return '\n'.join(rows)


def versus(model: float, other: float) -> str:
    change = 100 * (model / other - 1)
    return f'{abs(change):.1f} % {"more" if change > 0 else "less"}'


def draw_losses(lines: Sequence[Mapping[str, Any]], path: Path, comparison: CompressorComparison | None = None) -> None:
    """The curves of training and held-out loss, with the compressors as lines. Nothing is drawn without matplotlib."""
    if importlib.util.find_spec('matplotlib') is None:
        return
    steps = [(line['step'], line['bits_per_byte']) for line in lines if 'bits_per_byte' in line]
    checks = [(line['step'], line['held_out_bits_per_byte']) for line in lines if 'held_out_bits_per_byte' in line]
    with style():
        figure, [[axis]] = panels(width=7.5, height=4)
        if steps:
            axis.plot(*zip(*steps, strict=True), linewidth=0.7, alpha=0.7, color=BLUE, label='training batch')
        if checks:
            axis.plot(*zip(*checks, strict=True), marker='o', markersize=4, color=RED, label='held-out text')
        if comparison is not None:
            axis.axhline(comparison.gzip, color=GREEN, linestyle='--', linewidth=1, label=f'gzip -9: {comparison.gzip:.2f}')
            axis.axhline(comparison.xz, color=GREY, linestyle=':', linewidth=1, label=f'xz -9: {comparison.xz:.2f}')
            axis.set_ylim(min(comparison.xz, comparison.model) - 0.3, max(4.0, 1.5 * comparison.gzip))
        axis.set(xlabel='training step', ylabel='bits per byte')
        if axis.lines:
            name_beside(axis)
        save_figure(figure, path)
