"""The progress bar of a training run."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from x_transformers.training.trainer import Callback, Trainer


class Bar(Callback):
    """Steps, loss in bits per byte (smoothed), tokens per second, time left, the last held-out figure."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bar: tqdm[Any] | None = None
        self.smooth: float | None = None
        self.held_out: float | None = None

    def start(self, step: int) -> None:
        """Show the bar. The run goes on from ``step``: those before take no part in the time left."""
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.steps, initial=step, unit='step', file=sys.stderr, dynamic_ncols=live, ncols=None if live else 120,
            mininterval=0.1 if live else 10, bar_format='{l_bar}{bar}| {n}/{total} {remaining} left{postfix}',
        )  # fmt: skip

    def write(self, text: str) -> None:
        """Say something above the bar."""
        tqdm.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        bits = record['bits_per_byte']
        self.smooth = bits if self.smooth is None else 0.9 * self.smooth + 0.1 * bits
        held_out = '' if self.held_out is None else f', held out {self.held_out:.3f}'
        speed = record['tokens'] / max(record['seconds'], 1e-9)
        if self.bar is None:
            raise RuntimeError('the bar must be started before its first step, got a step. Call start.')
        self.bar.set_postfix_str(f'{self.smooth:.3f} bits/byte{held_out}, {speed:,.0f} tokens/s', refresh=False)
        self.bar.update(1)

    def validated(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.held_out = values.get('held_out_bits_per_byte')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
