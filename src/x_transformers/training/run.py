"""A training run: the folder, the model, the training, the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from x_transformers.flags.base import FlagError
from x_transformers.notices import unlogged
from x_transformers.saving.folder import model_config
from x_transformers.saving.plain import without_memory
from x_transformers.training.batches import Prefetched
from x_transformers.training.build import NUM_BYTES, build_model, choose_device, device_of, reading_arguments, refuse_inert
from x_transformers.training.checkpoint import publish
from x_transformers.training.corpus import Data, Say, check_vocabulary, load_data, load_sets, loss_and_bits_of_all
from x_transformers.training.engine import Engine
from x_transformers.training.errors import CheckpointError, TrainingError, last_line
from x_transformers.training.files import WEIGHTS, find_checkpoints, read_json, read_weights, write_atomically, write_json
from x_transformers.training.logs import check_logs, open_logs
from x_transformers.training.lora import add_lora, merged
from x_transformers.training.mup import mup_init_
from x_transformers.training.options import TrainOptions, merge_for_resume
from x_transformers.training.randomness import random_state, restore_random_state, seed_everything
from x_transformers.training.report import METRICS, PICTURE, CompressorComparison, Metrics, draw_losses, read_metrics
from x_transformers.training.sample import sample_text
from x_transformers.training.shards import Prepared
from x_transformers.training.speed import Utilization, peak_of, training_flops
from x_transformers.training.tokens import Bytes, Tokenizer, load_tokenizer
from x_transformers.training.trainer import Callback, Trainer, on_device

CONFIG = 'config.json'
SAMPLE = 'sample.txt'
SAMPLES = 'samples.txt'  # those written while training


@dataclass(frozen=True)
class RunConfig:
    """What ``config.json`` holds: everything that the weights and the losses depend on, and what ``from_pretrained`` reads."""

    flags: dict[str, Any]
    options: TrainOptions
    fingerprint: str = ''
    vocabulary: int = NUM_BYTES

    def write(self, run: Path) -> None:
        with without_memory(), unlogged():
            model = build_model(self.flags, self.vocabulary)
        values = {
            **model_config(model),
            'flags': self.flags,
            'training': self.options.to_json(),
            'corpus': self.fingerprint,
            'vocabulary': self.vocabulary,
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
        if isinstance(values, dict) and 'flags' not in values and 'model_type' in values:
            raise CheckpointError(f'{run} is in the Hugging Face format: `x-transformers hf import` makes it a folder of ours')
        try:
            flags = {name: tuple(value) if isinstance(value, list) else value for name, value in values['flags'].items()}
            options = TrainOptions.from_json(values['training'])
            return cls(flags, options, str(values['corpus']), int(values.get('vocabulary', NUM_BYTES)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f'{path} is not the configuration of a run ({error!r})') from error


# beginning


def begin(
    flags: Mapping[str, Any], options: TrainOptions, *, typed: Collection[str] = (), typed_flags: Collection[str] = ()
) -> RunConfig:
    """The configuration to train with: a new one in an empty folder, or the one of the run that is resumed.

    Args:
        typed, typed_flags: names of the options and of the flags that someone gave: the others say nothing about a run that
            is resumed, or from which another one starts.

    Errors: ``CheckpointError`` if the folder already holds a run and it is not resumed, or there is nothing to resume;
    ``TrainingError`` if a resumed run is asked to be another one.
    """
    run = Path(options.run_dir)
    options.check()
    if options.bf16:
        options = dataclasses.replace(options, precision='bf16')
    if options.tensorboard and 'tensorboard' not in options.log:
        options = dataclasses.replace(options, log=(*options.log, 'tensorboard'))
    check_logs(options.log)
    if options.resume:
        saved = RunConfig.read(run)
        check_same_model(flags, saved.flags, typed_flags, 'A resumed run keeps its model')
        more = {'precision'} & {'precision' for name in typed if name == 'bf16'}
        more |= {'log' for name in typed if name == 'tensorboard'}
        return dataclasses.replace(saved, options=merge_for_resume(options, saved.options, {*typed, *more}))
    if (run / CONFIG).exists() or find_checkpoints(run) or (run / WEIGHTS).exists():
        raise CheckpointError(f'{run} already holds a run: continue it with --resume, or choose another folder with --run-dir')
    first = Path(options.from_run) if options.from_run else None
    if first is not None and first.is_dir():
        base = RunConfig.read(first)
        check_same_model(flags, base.flags, typed_flags, 'A run keeps the model that it starts from')
        if 'tokenizer' in typed:
            check_same_tokenizer(options.tokenizer, first)
        return RunConfig(base.flags, options, vocabulary=base.vocabulary)
    if first is not None and not first.exists():
        raise CheckpointError(f'--from must be a run folder or a file of weights, but {first} does not exist.')
    refuse_inert(flags, typed_flags)
    return RunConfig(dict(flags), options)


def check_same_model(given: Mapping[str, Any], saved: Mapping[str, Any], typed: Collection[str], law: str) -> None:
    """Refuse flags that were typed and are not those of the run."""
    wrong = [
        f'--{name.replace("_", "-")} must be {saved.get(name)}, with which this run was started, got {given.get(name)}.'
        for name in sorted(typed)
        if as_json(given.get(name)) != as_json(saved.get(name))
    ]
    if wrong:
        raise TrainingError(f'{" ".join(wrong)} {law}: leave them out, or start a new run in another --run-dir.')


def check_same_tokenizer(given: str, first: Path) -> None:
    """Refuse a tokenizer that was typed and is not that of the run whose weights are taken."""
    own, other = load_tokenizer(first), None if given == 'bpe' else Bytes() if given == 'bytes' else load_tokenizer(Path(given))
    if other is None or own.digest() != other.digest():
        told = 'a new one' if other is None else f'another one of {other.size:,}'
        raise TrainingError(
            f'--tokenizer must be that of {first}, of {own.size:,} tokens, which its weights read, got {told}. Leave it out.'
        )


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return list(value) if isinstance(value, tuple) else value


@dataclass
class Run:
    """What is being trained, on what, into which folder."""

    folder: Path
    options: TrainOptions
    data: Data
    trainer: Trainer
    metrics: Metrics
    sets: Mapping[str, Prepared] = dataclasses.field(default_factory=dict)

    def train(self) -> None:
        if self.trainer.engine.is_main:
            self.metrics.forget_after(self.trainer.step)
        self.trainer.train()

    def loss(self, batch: Any) -> torch.Tensor:
        """Of the model as it is; inside ``trainer.evaluating()`` as it is to be evaluated. Not compiled: shapes vary."""
        model, batch = self.trainer.model, on_device(batch, self.trainer.device)
        given = reading_arguments(model)
        loss: torch.Tensor = model(**batch, **given) if isinstance(batch, Mapping) else model(batch, **given)
        return loss

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        limit = self.options.val_bytes
        found = self.data.evaluate(self.loss, self.options, limit)
        for name, made in self.sets.items():
            found[f'{name}_loss'], found[f'{name}_bits_per_byte'] = loss_and_bits_of_all(self.loss, made, self.options, limit)
        return found

    def sample(self, length: int) -> tuple[bytes, bytes]:
        """(prompt, what the model writes behind it); the same for the same weights."""
        options, prompt = self.options, self.options.sample_prompt.encode('utf-8', 'surrogateescape')
        with self.trainer.evaluating():
            torch.manual_seed(options.seed)
            return prompt, b''.join(sample_text(self.trainer.model, self.data.tokenizer, prompt, length))


class Samples(Callback):
    """Text of the model while it is trained."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        every = self.run.options.sample_every
        if every and record['step'] % every == 0:
            prompt, written = self.run.sample(self.run.options.sample_length or 200)
            text = (prompt + written).decode(errors='replace')
            if not trainer.engine.is_main:
                return
            with open(self.run.folder / SAMPLES, 'a', encoding='utf-8') as file:
                file.write(f'--- step {record["step"]}\n{text}\n')
            for log in self.run.metrics.logs:
                log.text(record['step'], 'sample', text)


def start_weights(model: nn.Module, first: Path | None, options: TrainOptions, engine: Engine) -> None:
    """Let a new run start from the weights of another, or from those that were drawn."""
    if first is not None:
        load_weights(model, first / WEIGHTS if first.is_dir() else first, engine)
    elif options.mup:
        mup_init_(model, options.mup_base)


def prepare_run(config: RunConfig, say: Say, callbacks: Sequence[Callback] = (), engine: Engine | None = None) -> Run:
    """Data, model and trainer, at the step where the run stands."""
    options, folder, engine = config.options, Path(config.options.run_dir), engine or Engine()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = engine.device or choose_device(options.device or 'auto')
    first = Path(options.from_run) if options.from_run else None
    checkpoints = find_checkpoints(folder) if options.resume else []
    own = folder if options.resume else first if first is not None and first.is_dir() else None
    with engine.main_first():
        data = load_data(options, say, run=own)
    vocabulary = data.tokenizer.size
    if own is not None:
        check_vocabulary(data.tokenizer, config.vocabulary)
    if options.mask_documents and config.flags.get('shift_tokens'):
        raise TrainingError('--mask-documents must not be combined with --shift-tokens, which looks over the border.')
    seed_everything(options.seed)
    model = engine.build(lambda: build_model(config.flags, vocabulary), device, options.seed)
    if not options.resume:
        start_weights(model, first, options, engine)
    if options.lora:
        add_lora(model, options.lora)
    rehearse(model, data, options)
    say(data.about)
    fingerprint = data.fingerprint()
    if options.resume and config.fingerprint and fingerprint != config.fingerprint:
        raise TrainingError(f'the data are not those that the run in {folder} was started with: {data.about}')
    loaded = engine.read(checkpoints[-1]) if checkpoints else None
    if loaded is not None and options.steps < loaded[0]:
        raise TrainingError(f'--steps must be at least {loaded[0]}, which this run has done already, got {options.steps}.')
    if folder.joinpath(METRICS).exists():
        read_metrics(folder / METRICS)
    with engine.main_first():
        sets = load_sets(options, data.tokenizer, say)
    logs = open_logs(options.log, folder, options.to_json()) if engine.is_main else []
    metrics = Metrics(folder, data.bytes_per_token, logs)
    batches = Prefetched(
        data.batches(options, engine.rank, engine.world_size),
        last=options.steps * options.grad_accum,
        pinned=device.type == 'cuda',
    )
    use = utilization(model, data, options, engine, device)
    told = [*use, metrics, *callbacks] if engine.is_main else []
    trainer = Trainer(
        model, batches, dataclasses.replace(options, device=None), callbacks=told,
        store=engine.store(folder, options.keep), best='held_out_loss' if options.keep_best else None,
        exported=merged if options.lora else None, engine=engine,
    )  # fmt: skip
    run = Run(folder, options, data, trainer, metrics, sets)
    trainer.evaluate = run.evaluate
    trainer.callbacks.append(Samples(run))
    if loaded is not None:
        trainer.resume(*loaded, where=str(checkpoints[-1]))
        say(f'resuming {folder} after step {trainer.step} of {options.steps}')
    if engine.is_main:
        write_beginning(dataclasses.replace(config, fingerprint=fingerprint, vocabulary=vocabulary), run, checkpoints)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f'{count:,} parameters on {device}, {options.optimizer}, {options.steps} steps')
    return run


def write_beginning(config: RunConfig, run: Run, checkpoints: Sequence[Path]) -> None:
    """What the folder holds before the first step; the last thing of all, as what cannot be resumed stays as it is."""
    run.data.tokenizer.save(run.folder)
    config.write(run.folder)
    if checkpoints:
        publish(checkpoints[-1])


def utilization(model: nn.Module, data: Data, options: TrainOptions, engine: Engine, device: torch.device) -> list[Callback]:
    """What measures the share of the device's peak, if that is known."""
    peak = options.peak_flops or peak_of(device)
    if peak is None:
        return []
    ids = data.first(options.seq_len).to(device)
    flops = engine.flops(lambda: training_flops(model, ids))
    return [Utilization(flops / (options.seq_len - 1), peak * engine.devices)]


def rehearse(model: nn.Module, data: Data, options: TrainOptions) -> None:
    """One sequence in training and in evaluation, before anything is written: what the model has against it is a sentence."""
    state, mode = random_state(), model.training
    ids = data.first(options.seq_len).to(device_of(model))
    more: dict[str, Any] = {}
    if options.mask_documents:
        more['attn_mask'] = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
    try:
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                loss = model(ids, **more, **({} if training else reading_arguments(model)))
            if loss.ndim != 0:
                raise TrainingError(f'a model with these flags gives no single loss, but one of shape {tuple(loss.shape)}')
    except FlagError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, IndexError) as error:
        kind = 'be trained on' if training else 'be evaluated on'
        unit = 'bytes' if data.tokenizer.size == NUM_BYTES else 'tokens'
        raise TrainingError(f'a model with these flags cannot {kind} {options.seq_len} {unit} (--seq-len): {error}') from error
    finally:
        model.train(mode)
        restore_random_state(state)


# end


def finish(run: Run, say: Say) -> CompressorComparison:
    """Measure the final figures, write the picture and the sample."""
    options, trainer, folder = run.options, run.trainer, run.folder
    is_main = trainer.engine.is_main
    with trainer.evaluating():
        text, bits = run.data.final(run.loss, options)
    comparison = CompressorComparison.of(text, bits)
    if is_main:
        run.metrics.add(step=trainer.step, final=dataclasses.asdict(comparison))
        draw_losses(read_metrics(folder / METRICS), folder / PICTURE, comparison)
    if options.sample_length:
        prompt, written = run.sample(options.sample_length)
        if is_main:
            write_atomically(folder / SAMPLE, prompt + written + b'\n')
        say('a sample:\n' + indent((prompt + written).decode(errors='replace')))
    say(str(comparison))
    run.metrics.close()
    return comparison


def indent(text: str) -> str:
    return '\n'.join(f'    {line}' for line in text.splitlines())


def load_weights(model: nn.Module, path: Path, engine: Engine | None = None) -> None:
    """Errors: ``CheckpointError`` if the file is missing, damaged, or of another model."""
    try:
        (engine or Engine()).load_model(model, read_weights(path))
    except (RuntimeError, ValueError) as error:
        told = last_line(error)
        raise CheckpointError(f'{path} must hold the weights of a model with these flags, got others: {told}') from error


def load_run(run: str | Path, device: str | torch.device = 'cpu') -> nn.Module:
    """The model of a run with its newest weights."""
    run = Path(run)
    config = RunConfig.read(run)
    model = build_model(config.flags, config.vocabulary)
    if not (run / WEIGHTS).exists():
        raise CheckpointError(f'{run} holds no weights yet: {WEIGHTS} is written with the first checkpoint')
    load_weights(model, run / WEIGHTS)
    return model.to(device)


def tokenizer_of(run: Path) -> Tokenizer:
    """The tokenizer of a run: its file in the folder, or bytes."""
    tokenizer = load_tokenizer(run)
    check_vocabulary(tokenizer, RunConfig.read(run).vocabulary)
    return tokenizer


__all__ = ['NUM_BYTES', 'Run', 'RunConfig', 'begin', 'finish', 'load_run', 'prepare_run', 'tokenizer_of']
