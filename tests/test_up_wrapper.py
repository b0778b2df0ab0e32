from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.objectives import builds_on_meta, decoder, encoder, ids, likely, saved_and_loaded
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper, random_sequences

SMALL: dict[str, Any] = {'buffer_size': 12, 'num_reset': 2, 'batch_size': 3, 'seq_len': 10, 'seed_length': 4}


def wrapper(**given: Any) -> UniversalPretrainWrapper:
    torch.manual_seed(0)
    return UniversalPretrainWrapper(decoder(), **(SMALL | given))


def constant_rows(rows: torch.Tensor) -> torch.Tensor:
    return (rows == rows[:, :1]).all(dim=-1)


def test_random_sequences() -> None:
    torch.manual_seed(0)
    rows = random_sequences(5, 400, 60, 40)
    assert rows.shape == (100, 400)
    constant = constant_rows(rows)
    assert int(constant.sum()) == 40
    assert len(rows[constant].unique()) == 1
    assert likely(torch.bincount(rows[~constant].flatten(), minlength=5), torch.full((5,), 0.2))
    assert not bool(constant[60:].all()), 'the rows are shuffled'
    kept = constant_rows(random_sequences(5, 400, 60, 40, shuffle=False))
    assert kept.tolist() == [False] * 60 + [True] * 40


def test_the_machine_reads_one_state_on() -> None:
    machine = SyntheticDataGenerator(8, 5)
    x = ids(2, 6, tokens=5)
    whole, _ = machine(x)
    first, state = machine(x[:, :4])
    second, _ = machine(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)


@pytest.mark.parametrize('use_gru', [False, True])
def test_cold_generation_is_greedy(use_gru: bool) -> None:
    torch.manual_seed(0)
    machine = SyntheticDataGenerator(8, 5, max_seq_len=9, use_gru=use_gru)
    seed, condition = ids(2, 3, tokens=5), ids(2, 4, tokens=5, seed=1)
    out = torch.cat((seed, condition), dim=1)
    made = machine.generate(6, seed=seed, condition=condition, temperature=0.0)
    for _ in range(6):
        out = torch.cat((out, machine(out)[0][:, -1:].argmax(dim=-1)), dim=1)
    assert made.tolist() == out[:, -9:].tolist()


def test_generation_follows_the_machine() -> None:
    torch.manual_seed(0)
    machine = SyntheticDataGenerator(8, 5)
    machine.to_logits.weight.data.mul_(5)
    start = torch.tensor([[1, 2]])
    probs = machine(start)[0][0, -1].softmax(dim=-1).detach()
    drawn = machine.generate(1, seed=start.expand(20_000, -1), temperature=1.0)[:, -1]
    assert likely(torch.bincount(drawn, minlength=5), probs)


def test_generation_again_with_the_same_generator() -> None:
    machine = SyntheticDataGenerator(8, 5)
    runs = [
        machine.generate(20, seed=ids(2, 3, tokens=5), temperature=1.0, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert runs[0].tolist() == runs[1].tolist()


def test_the_output_map_is_scaled_and_the_recurrent_weights_on_demand() -> None:
    """A uniform weight times a factor below 1.1: the largest of many weights shows the factor."""
    torch.manual_seed(0)
    factors = []
    for _ in range(200):
        machine = SyntheticDataGenerator(16, 40)
        factors.append(machine.to_logits.weight.abs().max().item() * 4)
        assert machine.net.weight_hh_l0.abs().max().item() * 4 > 0.98
    assert 0 < min(factors) < 0.1
    assert 1.0 < max(factors) <= 1.1
    assert sum(factors) / 200 == pytest.approx(0.55, abs=5 * 1.1 / 12**0.5 / 200**0.5)
    scaled = [SyntheticDataGenerator(16, 40, rescale_recurrent=True).net.weight_hh_l0.abs().max().item() * 4 for _ in range(50)]
    assert min(scaled) < 0.5


def test_the_buffer_changes() -> None:
    """In the original both writes go to copies: it trains on its first noise for ever."""
    model = wrapper()
    before = model.synth_data_buffer.clone()
    model()
    changed = (model.synth_data_buffer != before).any(dim=-1)
    assert 1 <= int(changed.sum()) <= 3 + 2
    for _ in range(20):
        model()
    # a constant row may have been drawn anew with the same token
    assert int((model.synth_data_buffer != before).any(dim=-1).sum()) >= 9
    assert int(model.step) == 21


def test_what_is_written_where() -> None:
    """Rows conditioned on hold what the machine wrote; others only change to fresh noise."""
    model = wrapper()
    written: list[torch.Tensor] = []
    conditions: list[torch.Tensor] = []
    generate = model.data_generator.generate

    def watched(length: int, **given: Any) -> torch.Tensor:
        conditions.append(given['condition'])
        written.append(generate(length, **given))
        assert given['seed'].shape == (3, 4)
        return written[-1]

    model.data_generator.generate = watched  # type: ignore[method-assign]
    before = model.synth_data_buffer.clone()
    model.advance()
    found = 0
    for row, old in zip(model.synth_data_buffer, before, strict=True):
        at = [k for k, made in enumerate(written[0]) if torch.equal(made, row)]
        if at and not torch.equal(row, old):
            assert any(torch.equal(conditions[0][k], old) for k in at)
            found += 1
    assert found >= 1


def test_crops_start_anywhere() -> None:
    model = wrapper()
    rows = torch.arange(10).expand(20_000, -1)
    crops = model.crops(rows)
    assert bool((crops.diff(dim=-1) == 1).all())
    assert likely(torch.bincount(crops[:, 0], minlength=6), torch.full((6,), 1 / 6))


def test_drawn_rows_are_distinct_and_even() -> None:
    model = wrapper()
    torch.manual_seed(0)
    counts: Counter[int] = Counter()
    for _ in range(6000):
        rows = model.draw(3).tolist()
        assert len(set(rows)) == 3
        counts.update(rows[:1])
    assert likely(counts, torch.full((12,), 1 / 12))


def test_another_machine_now_and_then() -> None:
    model = wrapper(reset_turing_machine_every=2)
    weight = model.data_generator.to_logits.weight
    seen = []
    for _ in range(4):
        model.advance()
        seen.append(weight.clone())
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])


def test_the_loss_trains_the_model_only() -> None:
    model = wrapper()
    model().backward()
    assert all(p.grad is not None for p in model.model.parameters())
    assert all(p.grad is None for p in model.data_generator.parameters())


def test_state() -> None:
    model = wrapper()
    keys = list(model.state_dict())
    net = list(model.model.state_dict())
    machine = [f'data_generator.{k}' for k in model.data_generator.state_dict()]
    expected = {'synth_data_buffer', 'step', *(f'model.{k}' for k in net), *(f'ar_wrapped.net.{k}' for k in net), *machine}
    assert set(keys) == expected
    assert {'data_generator.embed.weight', 'data_generator.to_logits.weight'} <= set(machine)
    model()
    twin = saved_and_loaded(model, wrapper())
    assert torch.equal(twin.synth_data_buffer, model.synth_data_buffer)
    torch.manual_seed(1)
    loss = model()
    torch.manual_seed(1)
    torch.testing.assert_close(twin(), loss)


def test_a_buffer_on_the_cpu_is_not_saved() -> None:
    model = wrapper(keep_buffer_on_cpu=True)
    assert 'synth_data_buffer' not in model.state_dict()
    before = model.synth_data_buffer.clone()
    assert bool(model().isfinite())
    assert not torch.equal(model.synth_data_buffer, before)
    assert model.to('meta').synth_data_buffer.device.type == 'cpu'


@pytest.mark.parametrize('on_cpu', [False, True])
def test_built_on_meta(on_cpu: bool) -> None:
    model = builds_on_meta(lambda: wrapper(keep_buffer_on_cpu=on_cpu))
    assert int(constant_rows(model.synth_data_buffer).sum()) == 6  # type: ignore[arg-type]
    assert int(model.step) == 0  # type: ignore[arg-type]
    assert bool(model().isfinite())


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'buffer_size': 3}, 'buffer_size'),
        ({'num_reset': 3}, 'num_reset'),
        ({'num_reset': 14}, 'num_reset'),
        ({'seed_length': 10}, 'seed_length'),
        ({'seq_len': 40}, 'absolute positions'),
        ({'data_generator': SyntheticDataGenerator(8, 9)}, 'data_generator'),
        ({'data_generator': SyntheticDataGenerator(8, 7, max_seq_len=9)}, 'max_seq_len'),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrapper(**given)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match='causal'):
        UniversalPretrainWrapper(encoder(length=12), **SMALL)
    machine = SyntheticDataGenerator(8, 5)
    with pytest.raises(ValueError, match='seed or condition must be given'):
        machine.generate(3)
    with pytest.raises(ValueError, match='condition must be'):
        machine.generate(3, seed=ids(2, 3), condition=ids(1, 3))
    with pytest.raises(ValueError, match='temperature'):
        machine.generate(3, seed=ids(2, 3), temperature=-1.0)
    with pytest.raises(ValueError, match='seq_len'):
        machine.generate(-3, seed=ids(2, 3))
    assert isinstance(SyntheticDataGenerator(8, 5, network_klass=nn.GRU).net, nn.GRU)
