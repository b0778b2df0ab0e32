"""A run from its first step to its last file: the folder, the model, the training, the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from x_transformers.flags.base import FlagError
from x_transformers.training.build import build_model, choose_device, reading_arguments
from x_transformers.training.checkpoint import (
    WEIGHTS,
    Checkpoints,
    find_checkpoints,
    load_checkpoint,
    publish,
    read_json,
    read_weights,
    write_atomically,
    write_json,
)
from x_transformers.training.data import ByteBatches, Corpus, Text, bits_per_byte, load_corpus
from x_transformers.training.errors import CheckpointError, TrainingError
from x_transformers.training.options import TrainOptions, merge_for_resume
from x_transformers.training.randomness import random_state, restore_random_state, seed_everything
from x_transformers.training.report import METRICS, PICTURE, Comparison, Metrics, draw_losses, read_metrics, tensorboard_writer
from x_transformers.training.sample import sample_bytes
from x_transformers.training.trainer import Callback, Trainer

CONFIG = 'config.json'
SAMPLE = 'sample.txt'


@dataclass(frozen=True)
class RunConfig:
    """What ``config.json`` holds: everything that the weights and the losses depend on."""

    flags: dict[str, Any]
    options: TrainOptions
    fingerprint: str = ''

    def write(self, run: Path) -> None:
        values = {
            'flags': self.flags,
            'training': self.options.to_json(),
            'corpus': self.fingerprint,
            'torch': torch.__version__,
        }
        write_json(run / CONFIG, values)

    @classmethod
    def read(cls, run: Path) -> RunConfig:
        path = run / CONFIG
        if not run.is_dir():
            raise CheckpointError(f'{run}: there is no such run folder')
        if not path.exists():
            raise CheckpointError(f'{run} holds no run: {CONFIG} is missing')
        values = read_json(path)
        try:
            flags = {name: tuple(value) if isinstance(value, list) else value for name, value in values['flags'].items()}
            return cls(flags, TrainOptions.from_json(values['training']), str(values['corpus']))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f'{path} is not the configuration of a run ({error!r})') from error


# beginning


def begin(
    flags: Mapping[str, Any], options: TrainOptions, *, typed: Collection[str] = (), typed_flags: Collection[str] = ()
) -> RunConfig:
    """The configuration to train with: a new one in an empty folder, or the one of the run that is resumed.

    Args:
        typed, typed_flags: names of the options and of the flags that someone gave: the others say nothing about a run that
            is resumed.

    Errors: ``CheckpointError`` if the folder already holds a run and it is not resumed, or there is nothing to resume;
    ``TrainingError`` if a resumed run is asked to be another one.
    """
    run = Path(options.run_dir)
    options.check()
    if options.tensorboard:
        tensorboard_writer()
    if options.resume:
        saved = RunConfig.read(run)
        check_same_model(flags, saved.flags, typed_flags)
        return dataclasses.replace(saved, options=merge_for_resume(options, saved.options, typed))
    if (run / CONFIG).exists() or find_checkpoints(run) or (run / WEIGHTS).exists():
        raise CheckpointError(f'{run} already holds a run: continue it with --resume, or choose another folder with --run-dir')
    if options.bf16:
        options = dataclasses.replace(options, precision='bf16')
    return RunConfig(dict(flags), options)


def check_same_model(given: Mapping[str, Any], saved: Mapping[str, Any], typed: Collection[str]) -> None:
    """Refuse flags that were typed and are not those of the run that is resumed."""
    wrong = [
        f'--{name.replace("_", "-")} must be {saved.get(name)}, with which this run was started, got {given.get(name)}.'
        for name in sorted(typed)
        if as_json(given.get(name)) != as_json(saved.get(name))
    ]
    if wrong:
        raise TrainingError(
            ' '.join(wrong) + ' A resumed run keeps its model: leave them out, or start a new run in another --run-dir.'
        )


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return list(value) if isinstance(value, tuple) else value


@dataclass
class Run:
    """What is being trained, on what, into which folder."""

    folder: Path
    options: TrainOptions
    corpus: Corpus
    trainer: Trainer
    metrics: Metrics

    def train(self) -> None:
        self.metrics.forget_after(self.trainer.step)
        self.trainer.train()

    def bits_per_byte(self, text: Text, limit: int | None = None) -> float:
        """Of the model as it is; inside ``trainer.evaluating()`` as it is to be evaluated."""
        options, trainer = self.options, self.trainer
        given = reading_arguments(trainer.model)
        return bits_per_byte(
            # not compiled: its shapes vary
            lambda ids: trainer.model(ids.to(trainer.device), **given),
            text,
            batch=options.batch,
            window=options.seq_len,
            limit=limit,
        )

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        return {'held_out_bits_per_byte': self.bits_per_byte(self.corpus.held_out, self.options.val_bytes)}


Say = Callable[[str], None]


def prepare(config: RunConfig, say: Say, callbacks: Sequence[Callback] = ()) -> Run:
    """Data, model and trainer, at the step where the run stands."""
    options, folder = config.options, Path(config.options.run_dir)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device or 'auto')
    seed_everything(options.seed)
    model = build_model(config.flags).to(device)
    corpus = load_corpus(options.data, window=options.seq_len)
    rehearse(model, corpus, options)
    say(corpus.about)
    fingerprint = corpus.fingerprint()
    if options.resume and config.fingerprint and fingerprint != config.fingerprint:
        raise TrainingError(f'the data are not those that the run in {folder} was started with: {corpus.about}')
    checkpoints = find_checkpoints(folder) if options.resume else []
    loaded = load_checkpoint(checkpoints[-1]) if checkpoints else None
    if loaded is not None and options.steps < loaded[0]:
        raise TrainingError(f'--steps must be at least {loaded[0]}, which this run has done already, got {options.steps}.')
    if folder.joinpath(METRICS).exists():
        read_metrics(folder / METRICS)
    dataclasses.replace(config, fingerprint=fingerprint).write(folder)
    metrics = Metrics(folder, tensorboard=options.tensorboard)
    batches = ByteBatches(corpus.train, batch=options.batch, window=options.seq_len, seed=options.seed)
    trainer = Trainer(
        model, batches, dataclasses.replace(options, device=None), callbacks=[metrics, *callbacks], store=Checkpoints(folder)
    )
    run = Run(folder, options, corpus, trainer, metrics)
    trainer.evaluate = run.evaluate
    if loaded is not None:
        trainer.resume(*loaded, where=str(checkpoints[-1]))
        publish(checkpoints[-1])
        say(f'resuming {folder} after step {trainer.step} of {options.steps}')
    count = sum(p.numel() for p in model.parameters())
    say(f'{count:,} parameters on {device}, {options.optimizer}, {options.steps} steps')
    return run


def rehearse(model: nn.Module, corpus: Corpus, options: TrainOptions) -> None:
    """One sequence in training and in evaluation, before anything is written: what the model has against it is a sentence."""
    state, mode = random_state(), model.training
    ids = corpus.train.window(0, options.seq_len).long()[None].to(next(model.parameters()).device)
    try:
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                loss = model(ids, **({} if training else reading_arguments(model)))
            if loss.ndim != 0:
                raise TrainingError(f'a model with these flags gives no single loss, but one of shape {tuple(loss.shape)}')
    except FlagError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, IndexError) as error:
        kind = 'be trained on' if training else 'be evaluated on'
        raise TrainingError(f'a model with these flags cannot {kind} {options.seq_len} bytes (--seq-len): {error}') from error
    finally:
        model.train(mode)
        restore_random_state(state)


# end


def finish(run: Run, say: Say) -> Comparison:
    """Measure the final figures, write the picture and the sample."""
    options, trainer, folder = run.options, run.trainer, run.folder
    text, _ = run.corpus.held_out.split(options.final_bytes)
    with trainer.evaluating():
        bits = run.bits_per_byte(text)
    comparison = Comparison.of(text, bits)
    run.metrics.add(step=trainer.step, final=dataclasses.asdict(comparison))
    draw_losses(read_metrics(folder / METRICS), folder / PICTURE, comparison)
    if options.sample_length:
        prompt = options.sample_prompt.encode('utf-8', 'surrogateescape')
        with trainer.evaluating():
            torch.manual_seed(options.seed)
            written = b''.join(sample_bytes(trainer.model, prompt, options.sample_length))
        write_atomically(folder / SAMPLE, prompt + written + b'\n')
        say('a sample:\n' + indent((prompt + written).decode(errors='replace')))
    say(str(comparison))
    return comparison


def indent(text: str) -> str:
    return '\n'.join(f'    {line}' for line in text.splitlines())


def load_run(run: Path, device: torch.device) -> nn.Module:
    """The model of a run with its newest weights."""
    config = RunConfig.read(run)
    model = build_model(config.flags)
    path = run / WEIGHTS
    if not path.exists():
        raise CheckpointError(f'{run} holds no weights yet: {WEIGHTS} is written with the first checkpoint')
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise CheckpointError(f'{path} does not fit the flags in {run / CONFIG}: {error}') from error
    return model.to(device)


__all__ = ['Corpus', 'Run', 'RunConfig', 'Text', 'begin', 'finish', 'load_run', 'prepare']
