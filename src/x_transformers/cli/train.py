"""``x-transformers train``."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from x_transformers.cli.bar import Bar
from x_transformers.cli.options import GROUPS, ModelOptions, group_class, model_fields
from x_transformers.cli.toml import config_path, from_file
from x_transformers.training.options import TrainOptions
from x_transformers.training.run import begin, finish, prepare
from x_transformers.training.trainer import Interrupted

ABOUT = """Train a language model over bytes and write it, its losses, their picture and a sample into a run folder.

Without options: a small GPT on the source text of Python's standard library, in a few minutes on two CPU cores.
"""


def train_class() -> type:
    """The options of this command: the run's own, then every flag of the model."""
    config = Annotated[str | None, tyro.conf.arg(help='TOML file with any of these options; the command line overrides it.')]
    fields: list[tuple[str, Any, Any]] = [
        ('config', config, dataclasses.field(default=None)),
        ('training', TrainOptions, dataclasses.field(default_factory=TrainOptions)),
        *model_fields(),
    ]
    made = dataclasses.make_dataclass('Train', fields, frozen=True)
    made.__doc__ = ABOUT
    return made


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], TrainOptions]:
    """(flags of the model, options of the run) from the command line and the file that it names."""
    command = train_class()
    path = config_path(arguments)
    file = from_file(path, TrainOptions)
    default = command(config=path, training=TrainOptions(**file.own), **file.groups)
    read = tyro.cli(
        command, args=list(arguments), default=default, prog='x-transformers train', config=(tyro.conf.OmitArgPrefixes,)
    )
    flags = ModelOptions(**{group: getattr(read, group) for group in GROUPS}).given() | file.only_here
    flags.setdefault('max_seq_len', read.training.seq_len)
    return flags, read.training


def usual_flags(options: TrainOptions) -> dict[str, Any]:
    """The model's flags when none is given."""
    flags = ModelOptions(**{group: group_class(group)() for group in GROUPS}).given()
    return flags | {'max_seq_len': options.seq_len}


def main(arguments: Sequence[str]) -> int:
    flags, options = parse(arguments)
    config = begin(flags, options, usual_flags(options))
    with Bar(config.options.steps) as bar:
        trainer = prepare(config, bar.bar.write, bar)
        bar.start(trainer.step)
        try:
            trainer.train()
        except Interrupted as stop:
            bar.bar.close()
            name = signal.Signals(stop.signal_number).name
            print(
                f'stopped by {name} after step {stop.step} of {config.options.steps}; everything is saved, continue with: '
                f'x-transformers train --run-dir {config.options.run_dir} --resume',
                file=sys.stderr,
            )
            return 128 + stop.signal_number
    finish(trainer, print)
    print(f'written to {config.options.run_dir}')
    return 0
