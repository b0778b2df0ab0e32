"""``x-transformers train``."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from x_transformers.cli.bar import Bar
from x_transformers.cli.options import GROUPS, ModelOptions, all_keywords, model_fields, typed_names
from x_transformers.cli.toml import config_path, from_file
from x_transformers.training.errors import TrainingError
from x_transformers.training.lock import locked
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


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What was asked for, and what of it was typed or stands in the file."""

    flags: dict[str, Any]
    options: TrainOptions
    typed: frozenset[str]

    @property
    def typed_flags(self) -> frozenset[str]:
        return self.typed & all_keywords().keys()


def parse(arguments: Sequence[str]) -> Parsed:
    """The flags of the model and the options of the run, from the command line and the file that it names."""
    command = train_class()
    path = config_path(arguments)
    file = from_file(path, TrainOptions)
    default = command(config=path, training=TrainOptions(**file.own), **file.groups)
    read = tyro.cli(
        command, args=list(arguments), default=default, prog='x-transformers train', config=(tyro.conf.OmitArgPrefixes,)
    )
    flags = ModelOptions(**{group: getattr(read, group) for group in GROUPS}).given() | file.only_here
    flags.setdefault('max_seq_len', read.training.seq_len)
    known = {*all_keywords(), *(field.name for field in dataclasses.fields(TrainOptions))}
    return Parsed(flags, read.training, frozenset(typed_names(arguments, known) | file.names))


def main(arguments: Sequence[str]) -> int:
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        raise TrainingError(
            f'WORLD_SIZE must be 1, got {os.environ["WORLD_SIZE"]}: this command trains in one process. Start it alone.'
        )
    asked = parse(arguments)
    with locked(Path(asked.options.run_dir), create=not asked.options.resume):
        config = begin(asked.flags, asked.options, typed=asked.typed, typed_flags=asked.typed_flags)
        with Bar(config.options.steps) as bar:
            run = prepare(config, bar.bar.write, [bar])
            bar.start(run.trainer.step)
            try:
                run.train()
            except Interrupted as stop:
                bar.bar.close()
                name = signal.Signals(stop.signal_number).name
                print(
                    f'stopped by {name} after step {stop.step} of {config.options.steps}; everything is saved, continue with: '
                    f'x-transformers train --run-dir {config.options.run_dir} --resume',
                    file=sys.stderr,
                )
                return 128 + stop.signal_number
        finish(run, print)
    print(f'written to {config.options.run_dir}')
    return 0
