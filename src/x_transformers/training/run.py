"""A run from its first step to its last file: the folder, the model, the training, the figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from x_transformers.training.build import build_model, choose_device, muon_matrices
from x_transformers.training.checkpoint import (
    WEIGHTS,
    find_checkpoints,
    read_json,
    read_weights,
    write_atomically,
    write_json,
)
from x_transformers.training.data import Corpus, Text, load_corpus
from x_transformers.training.errors import CheckpointError, TrainingError
from x_transformers.training.options import TrainOptions, merge_for_resume
from x_transformers.training.report import METRICS, PICTURE, Comparison, draw_losses, read_metrics
from x_transformers.training.sample import sample_bytes
from x_transformers.training.trainer import Progress, Trainer, random_state, restore_random_state

CONFIG = 'config.json'
SAMPLE = 'sample.txt'
Say = Callable[[str], None]


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


def begin(flags: Mapping[str, Any], options: TrainOptions, usual_flags: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration to train with: a new one in an empty folder, or the one of the run that is resumed.

    ``usual_flags`` are the flags of someone who gave none: those say nothing about a run that is resumed.

    Errors: ``CheckpointError`` if the folder already holds a run and it is not resumed, or there is nothing to resume;
    ``TrainingError`` if a resumed run is asked to be another one.
    """
    run = Path(options.run_dir)
    if run.exists() and not run.is_dir():
        raise CheckpointError(f'--run-dir {run} is a file, not a folder')
    options.check()
    if options.resume:
        saved = RunConfig.read(run)
        check_same_model(flags, saved.flags, usual_flags or {})
        return dataclasses.replace(saved, options=merge_for_resume(options, saved.options))
    if (run / CONFIG).exists() or find_checkpoints(run) or (run / WEIGHTS).exists():
        raise CheckpointError(f'{run} already holds a run: continue it with --resume, or choose another folder with --run-dir')
    return RunConfig(dict(flags), options)


def check_same_model(given: Mapping[str, Any], saved: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse flags that were given and are not those of the run that is resumed."""
    for name in sorted(given.keys() | usual.keys()):
        value = given.get(name)
        if as_json(value) not in (as_json(usual.get(name)), as_json(saved.get(name))):
            raise TrainingError(
                f'--{name.replace("_", "-")} {value} is not what this run was started with ({saved.get(name)}); '
                'a resumed run keeps its model: leave it out, or start a new run in another --run-dir'
            )


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return list(value) if isinstance(value, tuple) else value


def make_folder(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f'--run-dir {run} cannot be made: {error.strerror or error}') from error
    if not os.access(run, os.W_OK):
        raise CheckpointError(f'--run-dir {run} cannot be written to')


def prepare(config: RunConfig, say: Say, progress: Progress | None = None) -> Trainer:
    """Data, model and trainer, at the step where the run stands."""
    options = config.options
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    torch.manual_seed(options.seed)
    model = build_model(config.flags).to(device)
    corpus = load_corpus(options.data, window=options.seq_len)
    rehearse(model, corpus, options)
    say(corpus.about)
    fingerprint = corpus.fingerprint()
    if options.resume and config.fingerprint and fingerprint != config.fingerprint:
        raise TrainingError(f'the data are not those that the run in {options.run_dir} was started with: {corpus.about}')
    run = Path(options.run_dir)
    make_folder(run)
    if not options.resume:
        dataclasses.replace(config, fingerprint=fingerprint).write(run)
    trainer = Trainer(model, muon_matrices(model), corpus, options, run, progress)
    checkpoints = find_checkpoints(run)
    if options.resume and checkpoints:
        trainer.resume_from(checkpoints[-1])
        say(f'resuming {run} after step {trainer.step} of {options.steps}')
    count = sum(p.numel() for p in model.parameters())
    say(f'{count:,} parameters on {device}, {options.optimizer}, {options.steps} steps')
    return trainer


def rehearse(model: nn.Module, corpus: Corpus, options: TrainOptions) -> None:
    """One sequence, before anything is written: what the model has against it becomes a sentence."""
    state = random_state()
    ids = corpus.train.window(0, options.seq_len).long()[None].to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            loss = model(ids)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(f'a model with these flags cannot read {options.seq_len} bytes (--seq-len): {error}') from error
    restore_random_state(state)
    if loss.ndim != 0:
        raise TrainingError(f'a model with these flags gives no single loss, but one of shape {tuple(loss.shape)}')


# end


def finish(trainer: Trainer, say: Say) -> Comparison:
    """Measure the final figures, write the picture and the sample."""
    options, run = trainer.options, trainer.run
    held_out = trainer.corpus.held_out
    text, _ = held_out.split(options.final_bytes)
    bits = trainer.evaluate(text)
    comparison = Comparison.of(text, bits)
    trainer.metrics.add(step=trainer.step, held_out_bits_per_byte=bits, final=dataclasses.asdict(comparison))
    draw_losses(read_metrics(run / METRICS), run / PICTURE, comparison)
    if options.sample_length:
        prompt = options.sample_prompt.encode()
        generator_state = torch.get_rng_state()
        torch.manual_seed(options.seed)
        written = b''.join(sample_bytes(trainer.model, prompt, options.sample_length))
        torch.set_rng_state(generator_state)
        write_atomically(run / SAMPLE, prompt + written + b'\n')
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


__all__ = ['Corpus', 'RunConfig', 'Text', 'begin', 'finish', 'load_run', 'prepare']
