"""The training loop: steps, evaluation, checkpoints, and a clean exit on request.

In memory, without any file:

    trainer = Trainer(model, batches, TrainerOptions(steps=1000, lr=1e-3), evaluate=lambda model, step: {'accuracy': ...})
    history = trainer.train()
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from x_transformers.module import unit_modules
from x_transformers.tensor_types import Float, StateDict
from x_transformers.training.build import choose_device
from x_transformers.training.ema import AveragedWeights
from x_transformers.training.engine import Engine
from x_transformers.training.errors import CheckpointError, TrainingError, last_line
from x_transformers.training.optimizers import lr_share, make_optimizers, set_lr
from x_transformers.training.options import TrainerOptions
from x_transformers.training.randomness import random_state, restore_random_state, seed_everything

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
Loss = Callable[[Callable[..., Any], Any], Tensor]


class Batches(Protocol):
    """Where training examples come from."""

    def batch(self, index: int) -> Any:
        """What the model's forward takes: a tensor, a tuple (positional arguments) or a dictionary (keywords).

        ``index`` counts micro-batches from 0; without accumulation it is the step. The same index must give the same batch,
        or else draw from the global generators only: then a resumed run has the losses of one that was not stopped.

        A class may also have ``predictions(batch) -> int``, by which micro-batches of different sizes are weighted.
        """
        ...


class Callback:
    """Told what happens; derive from it and override what is of interest."""

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each step. ``record``: step, loss (nats), grad_norm, lr, seconds, and tokens where they are counted."""

    def validated(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """After each evaluation. ``values``: the step and what ``evaluate`` returned."""

    def saved(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is complete on disk."""


class Store(Protocol):
    """Where checkpoints go; ``checkpoint.Checkpoints`` is one."""

    def save(self, step: int, weights: StateDict, state: Mapping[str, Any], export: StateDict) -> None: ...

    def finished(self) -> list[Path]:
        """Checkpoints that have been completed since the last call."""
        ...

    def wait(self) -> None: ...
    def save_best(self, step: int, value: float, export: StateDict) -> None: ...


@dataclass
class History:
    """What a run did: one dictionary per step and one per evaluation."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [record['loss'] for record in self.steps]

    def last(self, name: str) -> float:
        """The newest value of that name that ``evaluate`` returned."""
        return next(float(values[name]) for values in reversed(self.evaluations) if name in values)


class Interrupted(Exception):
    """The run was asked to stop; everything is saved."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(step, signal_number)
        self.step = step
        self.signal_number = signal_number


class Trainer:
    """Trains a model whose forward returns the loss (nats).

    Args:
        model: a module; what its forward takes is what ``batches`` gives. It returns the loss, or a tuple with the loss in
            front, or a dictionary with ``loss`` in it.
        batches: an object with ``batch(index)``, or a function of the index. A batch on which nothing but the seed and the
            index have an influence makes runs repeatable.
        options: the loop's options. Options of the command work too.
        evaluate: called every ``val_every`` steps and after the last one with (model, step), in evaluation mode, without
            gradients, with the averaged weights if ``ema`` is on. It may draw random numbers: training does not notice.
        callbacks: told of steps, evaluations and checkpoints.
        loss: for models that return something else: (forward, batch on the device) -> loss.
        matrices: what Muon moves; left out: what the modules name in ``muon_parameters()``.
        store: writes checkpoints; left out, nothing is written, and signals are left alone.
        best: the name of a value of ``evaluate``: whenever it falls below all before, the store is told.
        exported: the state dict for use, where that is not the model's own.
        engine: where a step runs; left out: in this process on one device.

    A checkpoint keeps the optimizers' and the random generators' states: a run that was stopped anywhere and resumed has the
    losses of one that was not. The model must have been built from the same seed; ``seed_everything`` seeds all generators.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches | Callable[[int], Any],
        options: TrainerOptions | None = None,
        *,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[Callback] = (),
        loss: Loss | None = None,
        matrices: Iterable[nn.Parameter] | None = None,
        store: Store | None = None,
        best: str | None = None,
        exported: Callable[[nn.Module], StateDict] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.options = options or TrainerOptions()
        self.options.check()
        self.engine = engine or Engine()
        if self.options.device is not None:
            model = model.to(choose_device(self.options.device))
        self.model = model
        self.device = self.engine.device or next((p.device for p in model.parameters()), torch.device('cpu'))
        self.batch: Callable[[int], Any] = batches if not hasattr(batches, 'batch') else batches.batch
        self.predictions: Callable[[Any], int] | None = getattr(batches, 'predictions', None)
        self.evaluate = evaluate
        self.callbacks = list(callbacks)
        self.loss = loss or loss_of
        self.store = store
        self.best = best
        self.exported = exported
        self.optimizers = make_optimizers(model, self.options, matrices)
        # modules whose weights have unit length, and feed-forwards of experts whose balance a bias keeps
        self.unit_weights = unit_modules(model)
        self.balanced: list[Any] = [module for module in model.modules() if getattr(module, 'balances_by_bias', False)]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averaged = AveragedWeights(model, self.options.ema) if self.options.ema else None
        self.forward = self.engine.forward(model, self.options.compile)
        self.history = History()
        self.step = 0
        self.saved_at = -1
        self.seconds = 0.0  # of training, also before it was resumed
        self.tokens = 0
        self.best_value = math.inf

    # the run

    def train(self) -> History:
        """Go on until ``options.steps``; with a store everything is saved then.

        The generators are seeded before the first step. The model is left in the mode it was in.

        Errors: ``Interrupted`` after SIGINT or SIGTERM (only with a store), with a checkpoint of the last finished step;
        ``TrainingError`` when the loss or its gradient is not finite; ``CheckpointError`` when a checkpoint cannot be written.
        A second signal stops at once.
        """
        options, mode = self.options, self.model.training
        signals: AbstractContextManager[list[int]] = nullcontext([]) if self.store is None else caught_signals(self.engine)
        if self.step == 0:
            seed_everything(options.seed)
        self.model.train()
        with signals as caught:
            try:
                self._steps(caught)
            except BaseException as error:
                # what is being written waits for those that are lost, too
                if not self.engine.is_lost(error):
                    self._finish_saving()
                raise
            else:
                self._finish_saving()
            finally:
                self.model.train(mode)
        return self.history

    def _steps(self, caught: list[int]) -> None:
        options = self.options
        while self.step < options.steps:
            record = self.one_step()
            self.step += 1
            self.tell(record)
            last = self.step == options.steps
            if last or (options.val_every and self.step % options.val_every == 0):
                self.validate()
            stop = self.engine.agree(caught[0] if caught else 0)
            if last or stop or (options.save_every and self.step % options.save_every == 0):
                self.save()
            self._tell_saved()
            if stop and not last:
                raise Interrupted(self.step, stop)

    def _finish_saving(self) -> None:
        if self.store is not None:
            self.store.wait()
            self._tell_saved()

    def one_step(self) -> dict[str, Any]:
        """One optimizer step; what is to be told of it."""
        options, started = self.options, time.perf_counter()
        self.engine.begin_step(options.seed, self.step)
        set_lr(self.optimizers, lr_share(self.step, options))
        first = self.step * options.grad_accum
        batches = [self.batch(first + micro) for micro in range(options.grad_accum)]
        counts = [1 if self.predictions is None else self.predictions(batch) for batch in batches]
        everywhere = float(self.engine.total(torch.tensor(float(sum(counts))))) / self.engine.repeats
        shares = [count / max(everywhere, 1.0) for count in counts]
        parts = self.engine.gradients(self.loss_on_device, batches, shares)
        total = torch.stack(parts).sum() if parts else torch.zeros((), device=self.device)
        norm = self.engine.grad_norm(self.parameters)
        value, grad_norm = float(self.engine.total(total)), float(norm)
        if not math.isfinite(value) or not math.isfinite(grad_norm):
            what = f'loss is {value}' if not math.isfinite(value) else f'norm of the gradient is {grad_norm}'
            rates = f'--lr {options.lr:g}' + (f', --muon-lr {options.muon_lr:g}' if options.optimizer == 'muon' else '')
            kept = '' if self.store is None else '; the last checkpoint is untouched'
            raise TrainingError(f'the {what} at step {self.step + 1}: the learning rate ({rates}) may be too high{kept}')
        if options.clip:
            self.engine.clip(self.parameters, options.clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for unit in self.unit_weights:
            unit.normalize_()
        for balanced in self.balanced:
            balanced.balance_experts_()
        if self.averaged is not None:
            self.averaged.update()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        record: dict[str, Any] = {'step': self.step + 1, 'loss': value, 'grad_norm': grad_norm}
        if self.predictions is not None:
            self.tokens += int(everywhere)
            record |= {'tokens': self.tokens, 'tokens_per_second': round(everywhere / max(seconds, 1e-9), 1)}
        record['memory_bytes'] = memory_bytes(self.device)
        lr = {type(optimizer).__name__.lower(): optimizer.param_groups[0]['lr'] for optimizer in self.optimizers}
        return record | {'seconds': round(self.seconds, 3), 'lr': lr}

    def loss_on_device(self, batch: Any) -> Tensor:
        with self.autocast():
            return one_loss(self.loss(self.forward, on_device(batch, self.device)))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.precision == 'bf16')

    def tell(self, record: dict[str, Any]) -> None:
        self.history.steps.append(record)
        for callback in self.callbacks:
            callback.step(self, record)

    def validate(self) -> None:
        if self.evaluate is None:
            return
        with self.evaluating():
            values = {'step': self.step, **self.evaluate(self.model, self.step)}
        self.history.evaluations.append(values)
        for callback in self.callbacks:
            callback.validated(self, values)
        if self.best is not None and self.store is not None and values.get(self.best, math.inf) < self.best_value:
            self.best_value = float(values[self.best])
            self.store.save_best(self.step, self.best_value, self.export())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode, has its averaged weights, and may draw random numbers unnoticed."""
        was_training, state = self.model.training, random_state()
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast(), self.averages():
                yield
        finally:
            restore_random_state(state)
            self.model.train(was_training)

    def averages(self) -> AbstractContextManager[None]:
        return nullcontext() if self.averaged is None else self.averaged.applied()

    # checkpoints

    def export(self) -> StateDict:
        """The weights for use: the averaged ones if there are any."""
        with self.averages():
            state = (self.exported or self.engine.model_state)(self.model)
            return {name: tensor.clone() for name, tensor in state.items()} if self.averaged is not None else state

    def state(self) -> dict[str, Any]:
        """All but the weights that a continuation needs."""
        return {
            'optimizers': self.engine.optimizer_state(self.model, self.optimizers),
            'random': random_state(),
            'seconds': self.seconds,
            'tokens': self.tokens,
            'best': self.best_value,
            **({} if self.averaged is None else {'averaged': self.averaged.state()}),
        }

    def save(self) -> None:
        if self.store is None or self.saved_at == self.step:
            return
        weights = self.engine.model_state(self.model)
        own = self.exported is None and self.averaged is None
        self.store.save(self.step, weights, self.state(), weights if own else self.export())
        self.saved_at = self.step

    def _tell_saved(self) -> None:
        for path in self.store.finished() if self.store is not None else ():
            for callback in self.callbacks:
                callback.saved(self, path)

    def resume(self, step: int, weights: StateDict, state: Mapping[str, Any], where: str = 'the checkpoint') -> None:
        """Go on after ``step`` with what ``save`` gave to the store."""
        try:
            self.engine.load_model(self.model, weights)
            self.engine.load_optimizers(self.model, self.optimizers, state['optimizers'])
            restore_random_state(state['random'])
            self.seconds, self.tokens = float(state['seconds']), int(state.get('tokens', 0))
            self.best_value = float(state.get('best', math.inf))
            if self.averaged is not None:
                self.averaged.load(state['averaged'])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f'{where} does not fit the model and optimizers of this run: {last_line(error)}') from error
        self.step = self.saved_at = step


# a model's call


def loss_of(forward: Callable[..., Any], batch: Any) -> Tensor:
    """The loss of a model that returns it: a tensor is its one argument, a tuple are several, a dictionary is keywords."""
    if isinstance(batch, Mapping):
        out = forward(**batch)
    elif isinstance(batch, (tuple, list)):
        out = forward(*batch)
    else:
        out = forward(batch)
    if isinstance(out, Mapping):
        out = out['loss']
    elif isinstance(out, (tuple, list)):
        out = out[0]
    return out  # type: ignore[no-any-return]


def one_loss(loss: Any) -> Float[Tensor, '']:
    if not isinstance(loss, Tensor):
        raise TrainingError(f'the loss must be a tensor, got {type(loss).__name__}. Give Trainer(loss=...) a function for it.')
    if loss.ndim != 0:
        raise TrainingError(f'the loss must be one number, got the shape {tuple(loss.shape)}. Give Trainer(loss=...) its mean.')
    return loss


def on_device(batch: Any, device: torch.device) -> Any:
    """The same tensors, tuples and dictionaries on a device; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, '_fields'):
        return type(batch)(*(on_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(on_device(value, device) for value in batch)
    return batch


def memory_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of the device, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # there is none on Windows
        return 0
    # in KiB, but on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


# signals


@contextmanager
def caught_signals(engine: Engine) -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of stopping the program; a second one stops it.

    Of several processes not a second SIGTERM: whoever has started them hands on the one that all have got.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and not (engine.devices > 1 and number == signal.SIGTERM):
            raise KeyboardInterrupt
        if not caught and engine.is_main:
            print('\nstopping after this step, to save; once more stops at once', file=sys.stderr)
        caught.append(number)

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
