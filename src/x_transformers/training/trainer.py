"""The training loop: steps, validation, checkpoints, and a clean end when someone asks for it."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from x_transformers.training.checkpoint import load_checkpoint, save_checkpoint
from x_transformers.training.data import Corpus, Text, held_out_batches, sample_batch
from x_transformers.training.errors import CheckpointError, TrainingError
from x_transformers.training.optimizers import lr_share, make_optimizers, set_lr
from x_transformers.training.options import TrainOptions
from x_transformers.training.report import Metrics

NATS_PER_BIT = math.log(2)


class Progress(Protocol):
    """What the trainer tells of itself; the bar of the command line is one."""

    def step(self, step: int, bits: float, tokens_per_second: float) -> None: ...
    def validated(self, step: int, bits: float) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop; everything is saved."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(step, signal_number)
        self.step = step
        self.signal_number = signal_number


class Trainer:
    """Trains ``model``, which maps token ids (b n) to the mean loss in nats of predicting n - 1 of them.

    A batch depends on the seed and the step alone, and a checkpoint keeps the optimisers' and the random generators' states:
    a run that was stopped anywhere and resumed has the losses of one that was not.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Iterable[nn.Parameter],
        corpus: Corpus,
        options: TrainOptions,
        run: Path,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.corpus = corpus
        self.options = options
        self.run = run
        self.progress = progress
        self.device = next(model.parameters()).device
        self.optimizers = make_optimizers(model, matrices, options)
        self.metrics = Metrics(run, tensorboard=options.tensorboard)
        self.loss_fn = torch.compile(model) if options.compile else model
        self.step = 0
        self.saved_at = -1
        self.seconds = 0.0  # of training, over all sittings

    # the run

    def train(self) -> None:
        """Go on until ``options.steps``; everything is saved then.

        Errors: ``Interrupted`` after SIGINT or SIGTERM, with a checkpoint of the last finished step; ``TrainingError`` when the
        loss is not finite; ``CheckpointError`` when a checkpoint cannot be written. A second signal stops at once.
        """
        options = self.options
        self.metrics.forget_after(self.step)
        self.model.train()
        with caught_signals() as caught:
            while self.step < options.steps:
                bits = self.one_step()
                self.step += 1
                self.tell(bits)
                if options.val_every and self.step % options.val_every == 0 and self.step < options.steps:
                    self.validate()
                last = self.step == options.steps
                if last or caught or (options.save_every and self.step % options.save_every == 0):
                    self.save()
                if caught and not last:
                    raise Interrupted(self.step, caught[0])

    def one_step(self) -> float:
        """One optimiser step; its loss in bits per byte."""
        options, started = self.options, time.perf_counter()
        share = lr_share(self.step, options)
        set_lr(self.optimizers, share)
        total = 0.0
        for micro in range(options.grad_accum):
            index = self.step * options.grad_accum + micro
            ids = sample_batch(self.corpus.train, batch=options.batch, window=options.seq_len, seed=options.seed, index=index)
            loss = self.loss_of(ids, self.loss_fn)
            (loss / options.grad_accum).backward()
            total += loss.item() / options.grad_accum
        if not math.isfinite(total):
            raise TrainingError(
                f'the loss is {total} at step {self.step + 1}: the learning rates (--lr {options.lr:g}, --muon-lr '
                f'{options.muon_lr:g}) may be too high; the last checkpoint is untouched'
            )
        if options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        return total / NATS_PER_BIT

    def loss_of(self, ids: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        ids = ids.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16):
            return model(ids)

    def tell(self, bits: float) -> None:
        options = self.options
        tokens = self.step * options.batch * options.grad_accum * (options.seq_len - 1)
        speed = tokens / max(self.seconds, 1e-9)
        lr = {type(o).__name__.lower(): o.param_groups[0]['lr'] for o in self.optimizers}
        self.metrics.add(step=self.step, bits_per_byte=bits, tokens=tokens, seconds=round(self.seconds, 3), lr=lr)
        if self.progress is not None:
            self.progress.step(self.step, bits, speed)

    def validate(self) -> float:
        bits = self.evaluate(self.corpus.held_out, limit=self.options.val_bytes)
        self.metrics.add(step=self.step, held_out_bits_per_byte=bits)
        if self.progress is not None:
            self.progress.validated(self.step, bits)
        return bits

    @torch.no_grad()
    def evaluate(self, text: Text, limit: int | None = None) -> float:
        """Bits per byte on a text, each window on its own; draws no random numbers from the run's generators."""
        options = self.options
        was_training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        state = random_state()
        for ids in held_out_batches(text, batch=options.batch, window=options.seq_len, limit=limit):
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            total += self.loss_of(ids, self.model).item() * predicted  # not compiled: its shapes vary
            count += predicted
        restore_random_state(state)
        self.model.train(was_training)
        return total / count / NATS_PER_BIT

    # checkpoints

    def save(self) -> None:
        if self.saved_at == self.step:
            return
        state = {
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'random': random_state(),
            'seconds': self.seconds,
        }
        save_checkpoint(self.run, self.step, self.model.state_dict(), state)
        self.saved_at = self.step

    def resume_from(self, path: Path) -> None:
        step, weights, state = load_checkpoint(path)
        try:
            self.model.load_state_dict(weights)
            for optimizer, saved in zip(self.optimizers, state['optimizers'], strict=True):
                optimizer.load_state_dict(saved)
            restore_random_state(state['random'])
            self.seconds = float(state['seconds'])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f'{path} does not fit the model and optimisers of this run: {error}') from error
        self.step = self.saved_at = step


# random numbers


def random_state() -> dict[str, Any]:
    """The state of every generator that a model may draw from."""
    state: dict[str, Any] = {'python': random.getstate(), 'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available() and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])


# signals


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of stopping the program; a second one stops it."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print('\nstopping after this step, to save; once more stops at once', file=sys.stderr)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread may: elsewhere the caller's handlers stay
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
