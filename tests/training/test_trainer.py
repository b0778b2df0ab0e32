from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

from tests.training.tiny import make_trainer
from x_transformers.training.checkpoint import find_checkpoints
from x_transformers.training.errors import CheckpointError, TrainingError
from x_transformers.training.report import METRICS
from x_transformers.training.trainer import Interrupted


def losses(run):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return (
        [(line['step'], line['bits_per_byte']) for line in lines if 'bits_per_byte' in line],
        [(line['step'], line['held_out_bits_per_byte']) for line in lines if 'held_out_bits_per_byte' in line],
    )


@pytest.fixture
def uninterrupted(tmp_path):
    trainer = make_trainer(tmp_path / 'whole')
    trainer.train()
    return trainer


def assert_same_run(trainer, other):
    assert losses(trainer.run) == losses(other.run)
    for left, right in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_training_lowers_the_loss(uninterrupted):
    steps, checks = losses(uninterrupted.run)
    assert [step for step, _ in steps] == list(range(1, 13))
    assert [step for step, _ in checks] == [5, 10]
    assert steps[-1][1] < steps[0][1] - 0.3


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_a_killed_run_goes_on_exactly(tmp_path, optimizer):
    whole = make_trainer(tmp_path / 'whole', optimizer=optimizer)
    whole.train()

    class Killed(BaseException):
        pass

    first = make_trainer(tmp_path / 'killed', optimizer=optimizer)
    real = first.tell

    def tell(bits):
        real(bits)
        if first.step == 7:  # three steps after the last checkpoint, as kill -9 may come
            raise Killed

    first.tell = tell
    with pytest.raises(Killed):
        first.train()
    with open(first.run / METRICS, 'a') as file:
        file.write('{"step": 8, "bits_per')  # a line that was being written
    torch.manual_seed(99)  # another process has other random numbers
    second = make_trainer(tmp_path / 'killed', optimizer=optimizer)
    [path] = find_checkpoints(second.run)
    second.resume_from(path)
    assert second.step == 4
    second.train()
    assert_same_run(whole, second)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_stops(tmp_path, uninterrupted, number):
    first = make_trainer(tmp_path / 'stopped', save_every=0)
    real = first.tell

    def tell(bits):
        real(bits)
        if first.step == 6:
            os.kill(os.getpid(), number)

    first.tell = tell
    with pytest.raises(Interrupted) as stop:
        first.train()
    assert (stop.value.step, stop.value.signal_number) == (6, number)
    second = make_trainer(tmp_path / 'stopped', save_every=0)
    second.resume_from(find_checkpoints(second.run)[0])
    assert second.step == 6
    second.train()
    assert_same_run(uninterrupted, second)


def test_a_second_signal_stops_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    real = trainer.tell

    def tell(bits):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        real(bits)

    trainer.tell = tell
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulation_averages_micro_batches(tmp_path):
    trainer = make_trainer(tmp_path, grad_accum=3, optimizer='adamw', clip=0.0, save_every=0)
    trainer.model.eval()
    wanted = [torch.zeros_like(p) for p in trainer.model.parameters()]
    from x_transformers.training.data import sample_batch

    total = 0.0
    for index in range(3):
        loss = trainer.model(sample_batch(trainer.corpus.train, batch=4, window=16, seed=0, index=index)) / 3
        total += loss.item()
        for sum_, grad in zip(wanted, torch.autograd.grad(loss, list(trainer.model.parameters())), strict=True):
            sum_ += grad
    seen = []
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: seen.append([p.grad.clone() for p in trainer.model.parameters()])
    bits = trainer.one_step()
    assert bits == pytest.approx(total / math.log(2))
    for got, want in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_evaluation_is_the_mean_over_all_predicted_bytes_and_draws_no_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    text = trainer.corpus.held_out
    ids = text.window(0, len(text)).long()[None]
    with torch.no_grad():  # the tiny model sees one byte back only, so windows make no difference
        whole = trainer.model(ids).item() / math.log(2)
    trainer.model.train()
    state = torch.get_rng_state()
    assert trainer.evaluate(text) == pytest.approx(whole, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training


def test_a_loss_that_is_no_number_is_reported(tmp_path):
    trainer = make_trainer(tmp_path, lr=1e30, muon_lr=1e30, optimizer='adamw', clip=0.0)
    with pytest.raises(TrainingError, match=r'the loss is (nan|inf) at step'):
        trainer.train()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / 'a')
    trainer.train()
    other = make_trainer(tmp_path / 'b', optimizer='adamw')
    with pytest.raises(CheckpointError, match='does not fit'):
        other.resume_from(find_checkpoints(trainer.run)[0])
