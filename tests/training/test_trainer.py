from __future__ import annotations

import json
import math
import os
import random
import signal

import pytest
import torch
from torch import nn

from tests.training.tiny import make_run, resumed
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.training.checkpoint import load_checkpoint
from x_transformers.training.data import sample_batch
from x_transformers.training.ema import AveragedWeights
from x_transformers.training.errors import CheckpointError, TrainingError
from x_transformers.training.files import BEST, WEIGHTS, find_checkpoints, read_weights
from x_transformers.training.options import TrainerOptions
from x_transformers.training.report import METRICS
from x_transformers.training.trainer import Callback, Interrupted, Trainer

# ---------------------------------------------------------------- in memory


class Regression(nn.Module):
    """One linear map, with dropout and a draw from Python's generator, as layer dropout makes it."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, y):
        self.heard = (self.training, random.random() if self.training else None)
        return (self.map(self.drop(x)) - y).square().mean()


def linear_data(index, rows=8):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(rows, 4, generator=generator)
    return x, x.sum(dim=-1, keepdim=True)


def regression(seed=0, **options):
    torch.manual_seed(seed)
    given = {'steps': 20, 'lr': 0.1, 'optimizer': 'adamw', 'val_every': 6, 'weight_decay': 0.0}
    return Regression(), TrainerOptions(**(given | options))


def test_a_model_is_trained_in_memory_and_the_history_is_returned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, options = regression()
    told = []

    class Tell(Callback):
        def step(self, trainer, record):
            told.append(record['step'])

        def validated(self, trainer, values):
            told.append(('validated', values['step']))

    def evaluate(model, step):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {'error': (model.map.weight - 1).abs().max().item(), 'noise': torch.rand(()).item()}

    trainer = Trainer(model, linear_data, options, evaluate=evaluate, callbacks=[Tell()])
    history = trainer.train()
    assert history is trainer.history
    assert [record['step'] for record in history.steps] == list(range(1, 21))
    assert {'loss', 'grad_norm', 'lr', 'seconds'} <= history.steps[0].keys()
    assert [values['step'] for values in history.evaluations] == [6, 12, 18, 20]
    assert history.losses[-1] < 0.3 * history.losses[0]
    assert history.last('error') == history.evaluations[-1]['error'] < history.evaluations[0]['error']
    assert [name for name in told if isinstance(name, tuple)] == [('validated', step) for step in (6, 12, 18, 20)]
    assert [name for name in told if isinstance(name, int)] == list(range(1, 21))
    assert model.training
    assert not list(tmp_path.iterdir())


def test_one_seed_is_one_run_and_evaluation_changes_nothing():
    losses = []
    for noise in (0, 1, 2):
        model, options = regression()
        random.seed(noise)
        torch.manual_seed(noise)
        evaluate = (lambda model, step: {'x': torch.rand(()).item() + random.random()}) if noise else None
        losses.append(Trainer(model, linear_data, options, evaluate=evaluate).train().losses)
    assert losses[0] == losses[1] == losses[2]
    model, options = regression(seed=0)
    other = Trainer(model, linear_data, TrainerOptions(**(vars(options) | {'seed': 1}))).train().losses
    assert other != losses[0]


@pytest.mark.parametrize('form', ['tuple', 'dict', 'tensor', 'loss'])
def test_a_batch_is_what_the_forward_takes(form):
    model, options = regression(steps=3)

    class Rows:
        def batch(self, index):
            x, y = linear_data(index)
            return {'tuple': (x, y), 'dict': {'x': x, 'y': y}, 'tensor': torch.cat((x, y), dim=-1), 'loss': (x, y)}[form]

    wanted = Trainer(*regression(steps=3)[:1], linear_data, options).train().losses
    if form == 'tensor':
        outer = nn.ModuleList([model])
        outer.forward = lambda t: {'loss': model(t[:, :4], t[:, 4:])}
        got = Trainer(outer, Rows(), options).train().losses
    elif form == 'loss':
        got = Trainer(model, Rows(), options, loss=lambda forward, batch: forward(*batch)).train().losses
    else:
        got = Trainer(model, Rows(), options).train().losses
    assert got == wanted


def test_a_transformer_is_trained_by_both_optimizers():
    for optimizer in ('muon', 'adamw', 'sgd'):
        torch.manual_seed(0)
        layers = Decoder(dim=16, depth=1, heads=2, rotary_pos_emb=True)
        model = AutoregressiveWrapper(TransformerWrapper(num_tokens=8, max_seq_len=16, attn_layers=layers))
        ids = torch.arange(16).remainder(8).repeat(2, 1)
        options = TrainerOptions(steps=15, lr=0.02, muon_lr=0.02, optimizer=optimizer, schedule='wsd')
        losses = Trainer(model, lambda index, ids=ids: ids, options).train().losses
        assert losses[-1] < losses[0] - 0.4, optimizer


@pytest.mark.parametrize(
    ('loss', 'sentence'),
    [
        (lambda forward, batch: 1.0, 'the loss must be a tensor, got float'),
        (lambda forward, batch: forward(*batch) * torch.ones(2), r'the loss must be one number, got the shape \(2,\)'),
    ],
)
def test_a_loss_that_is_no_number_is_refused(loss, sentence):
    model, options = regression()
    with pytest.raises(TrainingError, match=sentence):
        Trainer(model, linear_data, options, loss=loss).train()


def test_options_that_make_no_sense_are_refused_together():
    with pytest.raises(TrainingError) as caught:
        Trainer(nn.Linear(1, 1), linear_data, TrainerOptions(steps=0, beta1=1.0, optimizer='adam', ema=1.0))
    for part in ('--steps must be at least 1, got 0.', '--beta1 must be', '--optimizer must be muon or adamw or sgd', '--ema'):
        assert part in str(caught.value)


def test_micro_batches_are_weighted_by_what_they_predict():
    model, options = regression(grad_accum=2, steps=1, clip=0.0)
    model.eval()
    sizes = [3, 9]

    class Rows:
        def batch(self, index):
            return linear_data(index, rows=sizes[index])

        def predictions(self, batch):
            return len(batch[0])

    parts = [linear_data(index, rows=size) for index, size in enumerate(sizes)]
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    wanted = torch.autograd.grad(model(*whole), model.map.weight)[0]
    seen = []
    trainer = Trainer(model, Rows(), options)
    trainer.optimizers[0].step = lambda: seen.append(model.map.weight.grad.clone())
    record = trainer.one_step()
    torch.testing.assert_close(seen[0], wanted)
    assert record['loss'] == pytest.approx(model(*whole).item())
    assert record['tokens'] == 12


def test_averaged_weights_are_what_is_evaluated():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = AveragedWeights(model, 0.9)
    expected = 0.0
    for step in range(30):
        with torch.no_grad():
            model.weight += 1
        averaged.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    with averaged.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 30

    model, options = regression(ema=0.9)
    seen = []
    trainer = Trainer(model, linear_data, options, evaluate=lambda model, step: seen.append(model.map.weight.clone()) or {})
    trainer.train()
    assert not torch.equal(seen[-1], model.map.weight)
    assert torch.equal(seen[-1], trainer.averaged.averages['map.weight'])


# ---------------------------------------------------------------- in a run folder


def losses(run):
    lines = [json.loads(line) for line in (run.folder / METRICS).read_text().splitlines()]
    return (
        [(line['step'], line['bits_per_byte']) for line in lines if 'bits_per_byte' in line],
        [(line['step'], line['held_out_bits_per_byte']) for line in lines if 'held_out_bits_per_byte' in line],
    )


class Call(Callback):
    """Calls a function after a step."""

    def __init__(self, at, function):
        self.at, self.function = at, function

    def step(self, trainer, record):
        if record['step'] == self.at:
            self.function()


@pytest.fixture
def uninterrupted(tmp_path):
    run = make_run(tmp_path / 'whole')
    run.train()
    return run


def assert_same_run(run, other):
    assert losses(run) == losses(other)
    for left, right in zip(run.trainer.model.parameters(), other.trainer.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_training_lowers_the_loss(uninterrupted):
    steps, checks = losses(uninterrupted)
    assert [step for step, _ in steps] == list(range(1, 13))
    assert [step for step, _ in checks] == [5, 10, 12]
    assert steps[-1][1] < steps[0][1] - 0.3


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize('options', [{}, {'optimizer': 'adamw', 'ema': 0.9}, {'optimizer': 'sgd', 'schedule': 'wsd'}])
def test_a_killed_run_goes_on_exactly(tmp_path, options):
    whole = make_run(tmp_path / 'whole', **options)
    whole.train()

    first = make_run(tmp_path / 'killed', **options)
    first.trainer.callbacks.append(Call(7, kill))  # three steps after the last checkpoint, as kill -9 may come
    with pytest.raises(Killed):
        first.train()
    with open(first.folder / METRICS, 'a') as file:
        file.write('{"step": 8, "bits_per')  # a line that was being written
    torch.manual_seed(99)  # another process has other random numbers
    random.seed(99)
    [path] = find_checkpoints(first.folder)
    second = resumed(make_run(tmp_path / 'killed', **options), path)
    assert second.trainer.step == 4
    second.train()
    assert_same_run(whole, second)
    assert (first.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_stops(tmp_path, uninterrupted, number):
    first = make_run(tmp_path / 'stopped', save_every=0)
    first.trainer.callbacks.append(Call(6, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Interrupted) as stop:
        first.train()
    assert (stop.value.step, stop.value.signal_number) == (6, number)
    second = resumed(make_run(tmp_path / 'stopped', save_every=0), find_checkpoints(first.folder)[0])
    assert second.trainer.step == 6
    second.train()
    assert_same_run(uninterrupted, second)


def test_a_second_signal_stops_at_once(tmp_path):
    run = make_run(tmp_path)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run.trainer.callbacks.append(Call(1, twice))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulation_averages_micro_batches(tmp_path):
    run = make_run(tmp_path, grad_accum=3, optimizer='adamw', clip=0.0, save_every=0)
    trainer = run.trainer
    trainer.model.eval()
    wanted = [torch.zeros_like(p) for p in trainer.model.parameters()]
    total = 0.0
    for index in range(3):
        loss = trainer.model(sample_batch(run.data.corpus.train, batch=4, window=16, seed=0, index=index)) / 3
        total += loss.item()
        for sum_, grad in zip(wanted, torch.autograd.grad(loss, list(trainer.model.parameters())), strict=True):
            sum_ += grad
    seen = []
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: seen.append([p.grad.clone() for p in trainer.model.parameters()])
    record = trainer.one_step()
    assert record['loss'] == pytest.approx(total)
    assert record['tokens'] == 3 * 4 * 15
    norm = math.sqrt(sum(grad.square().sum().item() for grad in wanted))
    assert record['grad_norm'] == pytest.approx(norm, rel=1e-4)
    for got, want in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_are_clipped(tmp_path):
    trainer = make_run(tmp_path, optimizer='adamw', clip=1e-3).trainer
    norms = []
    step = trainer.optimizers[0].step
    parameters = list(trainer.model.parameters())
    trainer.optimizers[0].step = lambda: norms.append(nn.utils.get_total_norm([p.grad for p in parameters]).item()) or step()
    assert trainer.one_step()['grad_norm'] > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_evaluation_is_the_mean_over_all_predicted_bytes_and_draws_no_random_numbers(tmp_path):
    run = make_run(tmp_path)
    model, text = run.trainer.model.eval(), run.data.corpus.held_out
    with torch.no_grad():  # the tiny model sees one byte back only, so windows make no difference
        whole = model(text.window(0, len(text)).long()[None]).item() / math.log(2)
    model.train()
    state = torch.get_rng_state()
    with run.trainer.evaluating():
        found = run.data.evaluate(run.loss, run.options, None)
    assert found['held_out_bits_per_byte'] == pytest.approx(whole, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_loss_that_is_not_finite_is_reported(tmp_path):
    run = make_run(tmp_path, lr=1e30, muon_lr=1e30, optimizer='adamw', clip=0.0)
    with pytest.raises(TrainingError, match=r'(loss is|norm of the gradient is) (nan|inf) at step'):
        run.train()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = make_run(tmp_path / 'a')
    run.train()
    with pytest.raises(CheckpointError, match='does not fit'):
        resumed(make_run(tmp_path / 'b', optimizer='adamw'), find_checkpoints(run.folder)[0])
    step, weights, state = load_checkpoint(find_checkpoints(run.folder)[0])
    narrow = {name: tensor[..., :1] for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match='size mismatch') as caught:
        make_run(tmp_path / 'c').trainer.resume(step, narrow, state)
    assert len(str(caught.value).splitlines()) == 1


def test_the_newest_checkpoints_and_the_best_weights_are_kept(tmp_path):
    run = make_run(tmp_path, save_every=2)
    run.trainer.store.keep = 3
    values = iter([3.0, 1.0, 2.0])
    run.trainer.evaluate = lambda model, step: {'loss': next(values)}
    run.trainer.best = 'loss'
    best = {}
    run.trainer.callbacks.append(
        Call(10, lambda: best.update({k: v.clone() for k, v in run.trainer.model.state_dict().items()}))
    )
    saved = []

    class Saved(Callback):
        def saved(self, trainer, path):
            saved.append(path.name)

    run.trainer.callbacks.append(Saved())
    run.train()
    assert [path.name for path in find_checkpoints(tmp_path)] == [f'checkpoint-{step:08d}' for step in (8, 10, 12)]
    assert saved == [f'checkpoint-{step:08d}' for step in (2, 4, 6, 8, 10, 12)]
    weights = read_weights(tmp_path / BEST)
    assert all(torch.equal(weights[name], tensor) for name, tensor in best.items())
    again = resumed(make_run(tmp_path), find_checkpoints(tmp_path)[-1])
    assert again.trainer.best_value == 1.0
