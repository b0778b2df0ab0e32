"""``x-transformers train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from x_transformers.cli.bar import Bar
from x_transformers.cli.ending import say_written, stopped
from x_transformers.cli.options import GROUPS, ModelOptions, all_keywords, model_fields, preset_option
from x_transformers.cli.parse import parse_typed, typed_names
from x_transformers.cli.toml import config_path, from_file
from x_transformers.flags.base import FlagError
from x_transformers.flags.presets import preset, preset_sentences
from x_transformers.training.build import USUAL_PRESET
from x_transformers.training.errors import TrainingError
from x_transformers.training.lock import locked
from x_transformers.training.options import AXES, WITH_TENSOR, TrainOptions, often, option
from x_transformers.training.run import CONFIG, begin, finish, prepare_run
from x_transformers.training.trainer import Interrupted

ABOUT = """Train a language model and write it, its losses, their picture and a sample into a run folder.

Without options: a small GPT on the source text of Python's standard library, in a few minutes on two CPU cores.
"""


def train_class() -> type:
    """The options of this command: the run's own, then every flag of the model."""
    config = Annotated[str | None, tyro.conf.arg(help='TOML file with any of these options; the command line overrides it.')]
    fields: list[tuple[str, Any, Any]] = [
        ('config', config, often(None)),
        ('preset', preset_option(), often(None)),
        ('training', TrainOptions, dataclasses.field(default_factory=TrainOptions)),
        *model_fields(),
    ]
    command = dataclasses.make_dataclass('Train', fields, frozen=True)
    command.__doc__ = ABOUT
    return command


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What was asked for, and what of it was typed or stands in the file."""

    flags: dict[str, Any]
    options: TrainOptions
    typed: frozenset[str]
    preset: str | None = None

    @property
    def typed_flags(self) -> frozenset[str]:
        named = frozenset() if self.preset is None else frozenset(preset(self.preset))
        return (self.typed | named) & all_keywords().keys()


def parse(arguments: Sequence[str]) -> Parsed:
    """The flags of the model and the options of the run, from the command line and the file that it names."""
    command = train_class()
    path = config_path(arguments)
    file = from_file(path, TrainOptions, arguments)
    default = command(config=path, preset=file.preset, training=TrainOptions(**file.own), **file.groups)
    read = parse_typed(default, arguments, 'x-transformers train')
    flags = ModelOptions(**{group: getattr(read, group) for group in GROUPS}).given() | file.only_here
    flags.setdefault('max_seq_len', read.training.seq_len)
    known = {*all_keywords(), *(field.name for field in dataclasses.fields(TrainOptions))}
    return Parsed(flags, as_it_stands(read.training), frozenset(typed_names(arguments, known) | file.names), file.preset)


def as_it_stands(options: TrainOptions) -> TrainOptions:
    """``--auto-resume`` is ``--resume`` where there is a run."""
    begun = options.auto_resume and (Path(options.run_dir) / CONFIG).exists()
    return dataclasses.replace(options, resume=True) if begun else options


def check_one_process(options: TrainOptions) -> None:
    """Refuse what takes several processes."""
    wrong = [f'--{name} must be 1 in one process, got {value}.' for name in AXES if (value := getattr(options, name)) > 1]
    wrong += [f'{option(name)} must be off in one process, got it on.' for name in WITH_TENSOR if getattr(options, name)]
    if wrong:
        raise TrainingError(' '.join(wrong) + ' Start several: torchrun --nproc-per-node N -m x_transformers train.')


def main(arguments: Sequence[str]) -> int:
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        from x_transformers.distributed.command import train

        return train(lambda: parse([with_long_name(argument) for argument in arguments]))
    asked = parse([with_long_name(argument) for argument in arguments])
    check_one_process(asked.options)
    try:
        return train_alone(asked)
    except FlagError as error:
        more = preset_sentences(error, asked.preset or USUAL_PRESET, asked.typed)
        raise FlagError(*error.sentences, *more) from error


def train_alone(asked: Parsed) -> int:
    with locked(Path(asked.options.run_dir), create=not asked.options.resume):
        config = begin(asked.flags, asked.options, typed=asked.typed, typed_flags=asked.typed_flags)
        with Bar(config.options.steps) as bar:
            run = prepare_run(config, bar.write, [bar])
            bar.start(run.trainer.step)
            try:
                run.train()
            except Interrupted as stop:
                bar.close()
                return stopped(stop, config.options)
        comparison = finish(run, print)
    say_written(run, comparison)
    return 0


def with_long_name(argument: str) -> str:
    """``--from`` is ``--from-run``: the short name cannot be that of a field."""
    return '--from-run' + argument.removeprefix('--from') if argument.partition('=')[0] == '--from' else argument
