"""The closing message of a training run: where its files are, or how to continue."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys

from x_transformers.training.options import TrainOptions
from x_transformers.training.report import CompressorComparison
from x_transformers.training.run import Run
from x_transformers.training.trainer import Interrupted


def say_written(run: Run, comparison: CompressorComparison) -> None:
    """Say where everything is."""
    print(f'written to {run.options.run_dir}')
    if run.options.json:
        loss = run.trainer.history.losses[-1] if run.trainer.history.steps else None
        result = {'run': str(run.folder), 'step': run.trainer.step, 'loss': loss, 'tokens': run.trainer.tokens}
        print(json.dumps(result | {'seconds': round(run.trainer.seconds, 3)} | dataclasses.asdict(comparison)))


def stopped(stop: Interrupted, options: TrainOptions) -> int:
    """Say that everything is saved; the exit status."""
    name = signal.Signals(stop.signal_number).name
    print(
        f'stopped by {name} after step {stop.step} of {options.steps}; everything is saved, continue with: '
        f'x-transformers train --run-dir {options.run_dir} --resume',
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps({'run': options.run_dir, 'step': stop.step, 'stopped_by': name}))
    if stop.signal_number == signal.SIGTERM and options.exit_on_term is not None:
        return options.exit_on_term
    return 128 + stop.signal_number
