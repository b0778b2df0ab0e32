"""Every generator against a description in loops: what a reader who knows only the rules would answer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from x_transformers.evidence.draws import Draws
from x_transformers.evidence.execute import operations, prepared_model
from x_transformers.evidence.model import IGNORE, SHARES, Batch, measure
from x_transformers.evidence.tasks import CLASSES, TASKS, make_task
from x_transformers.training.errors import TrainingError


def made(name: str, count: int = 48, test: bool = False, **options: Any) -> tuple[Any, Batch]:
    task = make_task(name, options)
    return task, task.rows(Draws('a test', name), count, test=test)


def asked(targets: torch.Tensor) -> dict[int, int]:
    """{position: answer} of one row."""
    return {place: int(answer) for place, answer in enumerate(targets.tolist()) if answer != IGNORE}


# ---------------------------------------------------------------- all of them

SMALL: dict[str, dict[str, Any]] = {'bytes': {'length': 16, 'data': ('README.md',)}}


@pytest.mark.parametrize('name', sorted(TASKS))
def test_batches_are_functions_of_seed_and_step(name: str) -> None:
    task = make_task(name, {'rows_per_step': 8, 'test_rows': 8, **SMALL.get(name, {})})
    again = make_task(name, {'rows_per_step': 8, 'test_rows': 8, **SMALL.get(name, {})})
    torch.manual_seed(1)
    first = task.batch(3, 5)
    torch.manual_seed(2)
    task.batch(3, 6)
    for one, other in zip(first.tensors(), again.batch(3, 5).tensors(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert any(not torch.equal(first.inputs, task.batch(seed, step).inputs) for seed, step in ((4, 5), (3, 7)))
    for one, other in zip(task.test().tensors(), again.test().tensors(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize('name', sorted(TASKS))
def test_models_take_the_batches_and_fit_the_vocabulary(name: str) -> None:
    task = make_task(name, {'rows_per_step': 4, 'test_rows': 4, **SMALL.get(name, {})})
    model = task.model({**task.flags, 'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8})
    batch = task.batch(0, 0)
    loss = model(batch)
    assert loss.shape == ()
    assert bool(loss.isfinite())
    loss.backward()
    measures = task.evaluate(model)
    assert task.metric in measures
    assert all(math.isfinite(value) for value in measures.values())
    assert batch.inputs.shape[1] <= task.longest
    assert int(batch.targets.max()) < task.num_tokens
    test = task.test()
    assert test.inputs.shape[1] <= task.longest


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(TrainingError, match='Did you mean mqar'):
        make_task('mqra')
    with pytest.raises(TrainingError, match='options of the task mqar must be among'):
        make_task('mqar', {'pears': 3})
    with pytest.raises(TrainingError, match='pairs must be at least 1'):
        make_task('mqar', {'pairs': 40})
    with pytest.raises(TrainingError, match='must name a file that exists'):
        make_task('nowhere.py:Task')
    with pytest.raises(TrainingError, match='must name a class derived from'):
        make_task('math:floor')


def test_names_are_all_different() -> None:
    assert len(TASKS) == len(CLASSES)


# ---------------------------------------------------------------- recall


def read_pairs(row: list[int], length: int) -> dict[int, int]:
    table: dict[int, int] = {}
    for place in range(0, length, 2):
        table[row[place]] = row[place + 1]
    return table


@pytest.mark.parametrize('random_filler', [False, True])
def test_recall(random_filler: bool) -> None:
    _, batch = made('mqar', vocabulary=64, length=32, pairs=5, random_filler=random_filler)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        table = read_pairs(row, 10)
        assert len(table) == 5
        assert all(1 <= key < 32 <= value < 64 for key, value in table.items())
        answers = asked(targets)
        assert sorted(row[place] for place in answers) == sorted(table)
        for place, answer in answers.items():
            assert place >= 10
            assert (place - 10) % 2 == 0
            assert answer == table[row[place]]
        if not random_filler:
            assert all(row[place] == 0 for place in range(10, 32) if place not in answers)


@pytest.mark.parametrize(
    ('name', 'options', 'expected'),
    [
        ('mqar', {'pairs': 3}, [3, 2, 1, 3]),
        ('mqar', {'pairs': 3, 'mixed': False}, [3, 3, 3, 3]),
        ('mqar/forgetting', {'pairs': 4, 'again': 2}, [4, 3, 2, 4]),
        ('mqar/compositional', {'pairs': 9}, [9, 4, 1, 9]),
        ('mqar/stacked', {'pairs': 2}, [2, 1, 2, 1]),
        ('mqar/continuous', {'pairs': 3}, [3, 2, 1, 3]),
    ],
)
def test_steps_of_training_have_fewer_pairs_in_turns(name: str, options: dict[str, Any], expected: list[int]) -> None:
    task = make_task(name, {'length': 64, 'rows_per_step': 4, 'test_rows': 4, **options})
    for step, pairs in enumerate(expected):
        batch, alike = task.batch(7, step), dataclasses.replace(task, pairs=pairs)
        assert (batch.targets != IGNORE).sum(dim=1).tolist() == [pairs] * 4
        drawn = alike.rows(Draws(task.name, 'train', 7, step), 4)
        assert torch.equal(batch.inputs, drawn.inputs)
        assert torch.equal(batch.targets, drawn.targets)
    assert (task.test().targets != IGNORE).sum(dim=1).tolist() == [task.pairs] * 4


def test_near_questions_are_likelier_as_the_weights_say() -> None:
    """The first place of one pair: drawn in proportion to g^(a - 1)."""
    _, batch = made('mqar', count=20_000, vocabulary=16, length=14, pairs=1)
    gaps = ((batch.targets != IGNORE).nonzero()[:, 1] - 2) // 2 + 1
    weights = torch.arange(1, 7).double().pow(0.01 - 1)
    found = gaps.bincount(minlength=7)[1:].double() / len(gaps)
    assert torch.allclose(found, weights / weights.sum(), atol=0.012)


def test_subsets_with_weights_are_drawn_one_after_the_other() -> None:
    weights = torch.tensor([4.0, 2.0, 1.0])
    found = Draws('subsets').weighted_subsets(30_000, weights, 2)
    for first, second in itertools.permutations(range(3), 2):
        rest = float(weights.sum() - weights[first])
        expected = float(weights[first] / weights.sum()) * float(weights[second]) / rest
        share = float(((found[:, 0] == first) & (found[:, 1] == second)).double().mean())
        assert share == pytest.approx(expected, abs=0.012)


def test_forgetting_counts_the_last_value() -> None:
    _, batch = made('mqar/forgetting', vocabulary=64, length=40, pairs=5, again=3)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        table = read_pairs(row, 16)
        assert len(table) == 5
        assert len(set(row[10:16:2])) == 3
        assert {place: table[row[place]] for place in asked(targets)} == asked(targets)
        assert len(asked(targets)) == 5


def test_compositional_keys_need_both_tokens() -> None:
    _, batch = made('mqar/compositional', vocabulary=64, length=36, pairs=4)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        table = {(row[at], row[at + 1]): row[at + 2] for at in range(0, 12, 3)}
        assert len(table) == 4
        assert len({first for first, _ in table}) == len({second for _, second in table}) == 2
        answers = asked(targets)
        assert len(answers) == 4
        for place, answer in answers.items():
            assert answer == table[row[place - 1], row[place]]


def test_stacked_pairs_share_a_place() -> None:
    _, batch = made('mqar/stacked', vocabulary=64, length=20, pairs=4)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        table = dict(row[:4])
        assert all(value == 0 for _, value in row[4:])
        assert {place: table[row[place][0]] for place in asked(targets)} == asked(targets)
        assert len(asked(targets)) == 4


def test_continuous_recall_asks_for_the_number_of_the_pair() -> None:
    _, batch = made('mqar/continuous', length=20, pairs=3, vectors=8)
    assert batch.values is not None
    for row, values, targets in zip(batch.inputs, batch.values, batch.targets, strict=True):
        for place, answer in asked(targets).items():
            same = [pair for pair in range(3) if torch.equal(row[2 * pair], row[place])]
            assert same == [answer]
            assert torch.equal(row[2 * answer + 1], values[answer])
        assert len(asked(targets)) == 3


# ---------------------------------------------------------------- mad


def test_in_context_recall() -> None:
    for test in (False, True):
        _, batch = made('mad/in-context', test=test, vocabulary=8, length=20)
        for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
            table: dict[int, int] = {}
            expected = {}
            for place in range(0, 20, 2):
                key, value = row[place], row[place + 1]
                assert key < 4 <= value
                if key in table:
                    assert table[key] == value
                    expected[place] = value
                table[key] = value
            assert 18 in expected
            assert asked(targets) == (expected if test else {place: row[place + 1] for place in range(19)})


def test_noisy_recall() -> None:
    noisy = 0
    for test in (False, True):
        _, batch = made('mad/noisy', test=test, vocabulary=8, length=24, noise=0.4, noise_tokens=6)
        for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
            table: dict[int, int] = {}
            expected = {}
            for place in range(0, 24, 2):
                key, value = row[place], row[place + 1]
                assert (key >= 8) == (value >= 8)
                noisy += key >= 8
                if key >= 8:
                    continue
                if key in table:
                    assert table[key] == value
                    expected[place] = value
                table[key] = value
            assert 22 in expected
            assert asked(targets) == (expected if test else {place: row[place + 1] for place in range(23)})
    assert noisy / (2 * 48 * 12) == pytest.approx(0.4 * 10 / 12, abs=0.05)


def test_fuzzy_recall() -> None:
    for test in (False, True):
        _, batch = made('mad/fuzzy', test=test, vocabulary=12, length=60)
        sizes = set()
        for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
            # runs of key tokens and of value tokens in turn
            runs = [(kind, list(group)) for kind, group in itertools.groupby(enumerate(row), key=lambda item: item[1] >= 6)]
            table: dict[tuple[int, ...], tuple[int, ...]] = {}
            expected: dict[int, int] = {}
            for (is_value, key), (_, value) in zip(runs[0::2], runs[1::2], strict=False):
                assert not is_value
                motif = tuple(token for _, token in key)
                answer = tuple(token for _, token in value)
                whole = value[-1][0] < 59
                assert len(set(motif)) == len(motif) <= 3
                assert len(set(answer)) == len(answer) <= 3
                sizes.add(len(motif))
                if motif in table:
                    assert table[motif][: len(answer)] == answer
                    expected |= {place - 1: token for place, token in value}
                elif whole:
                    table[motif] = answer
            if test:
                assert asked(targets) == expected
            else:
                assert asked(targets) == {place: row[place + 1] for place in range(59)}
        assert sizes == ({3} if test else {1, 2, 3})


def test_selective_copying() -> None:
    _, batch = made('mad/selective-copying', vocabulary=10, length=30, copied=5)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        data = [token for token in row[:24] if token != 8]
        assert len(data) == 5
        assert row[24] == 9
        assert row[25:] == [8] * 5
        assert asked(targets) == {25 + place: token for place, token in enumerate(data)}


def test_compression() -> None:
    _, batch = made('mad/compression', vocabulary=10, length=12)
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        assert row[-1] == 10
        assert max(row[:-1]) < 10
        assert asked(targets) == dict(enumerate(row))


def test_memorization_keeps_one_map() -> None:
    _, batch = made('mad/memorization', vocabulary=20, length=16)
    table: dict[int, int] = {}
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        answers = asked(targets)
        assert sorted(answers) == list(range(1, 16, 2))
        for place, answer in answers.items():
            assert row[place] == 20
            assert 10 <= answer < 20
            assert table.setdefault(row[place - 1], answer) == answer


def test_few_samples_are_met_again() -> None:
    task = make_task('mad/in-context', {'samples': 64, 'rows_per_step': 32, 'length': 16})
    first = {task.batch(0, step).inputs.numpy().tobytes() for step in range(2)}
    later = {task.batch(0, step).inputs.numpy().tobytes() for step in range(2, 12)}
    assert len(first) == 2
    assert first == later


# ---------------------------------------------------------------- length


def solve(name: str, question: list[int]) -> list[int]:
    """What the answer is, in plain Python."""
    kind = name.partition('/')[2]
    if kind == 'parity':
        return [sum(question) % 2]
    if kind == 'even-pairs':
        return [int(sum(a != b for a, b in itertools.pairwise(question)) % 2 == 0)]
    if kind == 'cycle':
        return [sum({0: 0, 1: 1, 2: -1}[move] for move in question) % 5]
    if kind == 'modular':
        text = ''.join(str(s) if s < 5 else {5: '+', 6: '-', 7: '*'}[s] for s in question)
        return [eval(text) % 5]
    if kind == 'copy':
        return question
    if kind == 'reverse':
        return question[::-1]
    if kind == 'duplicate':
        return question + question
    if kind == 'sort':
        return sorted(question)
    assert kind == 'addition'
    plus = question.index(10)
    first, second = (int(''.join(map(str, digits[::-1]))) for digits in (question[:plus], question[plus + 1 :]))
    wide = max(plus, len(question) - plus - 1) + 1
    return [int(digit) for digit in str(first + second).zfill(wide)[::-1]]


@pytest.mark.parametrize('name', [name for name in sorted(TASKS) if name.startswith('length/')])
@pytest.mark.parametrize('test', [False, True])
def test_length_tasks(name: str, test: bool) -> None:
    task, batch = made(name, count=96, test=test, trained=9, tested=17)
    equals, fill = task.num_tokens - 2, task.num_tokens - 1
    sizes = set()
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        end = row.index(equals)
        question, answers = row[:end], asked(targets)
        answer = solve(name, question)
        assert answers == {end + place: token for place, token in enumerate(answer)}
        assert row[end + 1 : end + len(answer)] == answer[:-1]
        assert all(token == fill for token in row[end + len(answer) :])
        sizes.add(end)
    shortest, longest = (10, 17) if test else (1, 9)
    slack = 1 if name.endswith(('modular', 'addition')) else 0
    assert min(sizes) >= (3 if name.endswith('addition') and not test else shortest - slack)
    assert max(sizes) <= longest
    assert len(sizes) >= 3


def test_random_positions_are_sorted_and_different() -> None:
    task, batch = made('length/copy', trained=5, tested=8, random_positions=64)
    assert batch.positions is not None
    places = batch.positions.tolist()
    assert len(places) == batch.inputs.shape[1]
    assert places == sorted(set(places))
    assert max(places) < 64
    assert task.longest == 64


# ---------------------------------------------------------------- physics


@pytest.mark.parametrize('test', [False, True])
def test_depo(test: bool) -> None:
    _, batch = made('depo', test=test, words=9, hops=4, questions=5)
    sizes = set()
    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        after: dict[int, int] = {}
        place = 0
        while row[place] <= 9 and row[place] > 0:
            after[row[place]] = row[place + 1]
            place += 2
        sizes.add(len(after))
        # one cycle through all words
        word, seen = next(iter(after)), []
        for _ in after:
            seen.append(word)
            word = after[word]
        assert word == seen[0]
        assert len(set(seen)) == len(after)
        answers = {}
        for question in range(5):
            at = place + 3 * question
            hops, word = row[at] - 9, row[at + 1]
            assert hops in ((1, 2, 4) if test else (1, 2, 3, 4))
            for _ in range(hops):
                word = after[word]
            answers[at + 1] = word
            assert row[at + 2] == word
        assert asked(targets) == answers
        assert all(token == 0 for token in row[place + 15 :])
    assert sizes == ({9} if test else set(range(3, 10)))


@pytest.mark.parametrize('test', [False, True])
def test_mano(test: bool) -> None:
    _, batch = made('mano', count=200, test=test, operators=3, modulus=7)
    shapes = set()

    def value(tokens: list[int]) -> int:
        token = tokens.pop(0)
        if token < 7:
            return token
        first, second = value(tokens), value(tokens)
        return {7: first + second, 8: first - second, 9: first * second}[token] % 7

    for row, targets in zip(batch.inputs.tolist(), batch.targets, strict=True):
        operators = row[0] - 10
        assert operators in ((3,) if test else (1, 2, 3))
        expression = row[1 : 2 * operators + 2]
        shapes.add(tuple(token >= 7 for token in expression))
        rest = list(expression)
        assert asked(targets) == {2 * operators + 2: value(rest)}
        assert rest == []
        assert row[2 * operators + 2] == 10
    # all shapes of binary trees: 5 with three operators, 2 with two, 1 with one
    assert len(shapes) == (5 if test else 8)


# ---------------------------------------------------------------- data


def test_bytes_are_windows_of_the_text(tmp_path: Any) -> None:
    path = tmp_path / 'text'
    text = bytes(range(32, 127)) * 60
    path.write_bytes(text)
    task = make_task('bytes', {'data': [str(path)], 'length': 16, 'rows_per_step': 4, 'test_rows': 5})
    for batch in (task.batch(0, 3), task.test()):
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert bytes([row[0], *targets]) in text
            assert row[1:] == targets[:-1]
    assert task.options()['fingerprint']
    measures = task.evaluate(task.model({**task.flags, 'dim': 16, 'depth': 1}))
    assert measures['bits'] == pytest.approx(measures['loss'] / math.log(2))


def test_longer_bytes_are_tested_in_longer_windows(tmp_path: Any) -> None:
    path = tmp_path / 'text'
    text = bytes(range(32, 127)) * 60
    path.write_bytes(text)
    task = make_task('bytes/longer', {'data': [str(path)], 'length': 8, 'tested': 32, 'rows_per_step': 4, 'test_rows': 5})
    for batch, length in ((task.batch(0, 3), 8), (task.test(), 32)):
        assert batch.inputs.shape[1] == length
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert bytes([row[0], *targets]) in text
            assert row[1:] == targets[:-1]
    assert task.model({**task.flags, 'dim': 16, 'depth': 1}).net.max_seq_len == 32
    with pytest.raises(TrainingError, match='tested must be at least length=64'):
        make_task('bytes/longer', {'length': 64, 'tested': 32})


@pytest.mark.parametrize(
    'pool', [{}, {'use_cls_token': True}, {'attn_pool': True}, {'attn_pool': True, 'num_pooled_tokens': 2}]
)
def test_whole_digits_are_the_digits_without_a_question(pool: dict[str, Any]) -> None:
    whole, asked = make_task('digits/pooled', {'rows_per_step': 6}), make_task('digits', {'rows_per_step': 6})
    test, question = whole.test(), asked.test()
    assert torch.equal(test.inputs, question.inputs[:, :64])
    assert torch.equal(test.targets[:, 0], question.targets[:, -1])
    model = whole.model({'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, **pool})
    assert not model.net.attn_layers.causal
    batch = whole.batch(0, 0)
    logits, targets = model.answers(batch)
    assert logits.shape == (6, 10)
    assert torch.equal(targets, batch.targets[:, 0])
    model(batch).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # pooled tokens stand in the place of the network's own logits
    assert all(name.startswith('net.to_logits') for name in without)
    assert ('attn_pool' in pool) == bool(without)
    assert operations(whole, model) > 0


def test_digits_hold_out_the_last_fifth() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    task = make_task('digits', {'rows_per_step': 40})
    test = task.test()
    assert test.inputs[:, :64].tolist() == images[-359:].astype(int).tolist()
    assert test.targets[:, 64].tolist() == labels[-359:].tolist()
    training = {tuple(image) for image in images[:-359].astype(int).tolist()}
    batch = task.batch(0, 0)
    assert all(tuple(row[:64]) in training for row in batch.inputs.tolist())


def test_shapes_are_their_templates_when_nothing_disturbs_them() -> None:
    task = make_task('shapes', {'noise': 0.0})
    batch = task.rows(Draws('shapes', 'test'), 32)
    templates = task.templates()
    for row, label in zip(batch.inputs[:, :, 0], batch.targets[:, -1].tolist(), strict=True):
        # a straight slope goes through the places where there is no shape
        best = {}
        for number, template in enumerate(templates):
            for wide in range(12, 21):
                for start in range(40 - wide):
                    at = torch.linspace(0, 11, wide)
                    low = at.floor().clamp(0, 10).long()
                    curve = template[low] * (1 - at + low) + template[low + 1] * (at - low)
                    whole = torch.zeros(40)
                    whole[start : start + wide] = curve
                    parts = torch.stack((whole, torch.linspace(-1, 1, 40)), dim=1)
                    fit = torch.linalg.lstsq(parts, row[:, None]).solution
                    if float(fit[0]) > 0:
                        error = float((parts @ fit - row[:, None]).square().sum())
                        best[number] = min(best.get(number, math.inf), error)
        assert sorted(best, key=best.__getitem__).index(label) == 0
        break  # one row is enough for a search of this size


# ---------------------------------------------------------------- measures


def test_measures_by_hand() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def answers(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            keep = batch.targets != IGNORE
            logits = torch.nn.functional.one_hot(batch.inputs[keep], 3).float() * 5
            return logits, batch.targets[keep]

    inputs = torch.tensor([[0, 1, 2], [0, 0, 0]])
    targets = torch.tensor([[0, 1, 2], [0, 1, IGNORE]])
    found = measure(Fixed(), Batch(inputs, targets), rows_at_once=1)
    assert found['accuracy'] == pytest.approx(4 / 5)
    assert found['exact'] == pytest.approx(1 / 2)
    assert found['balanced_accuracy'] == pytest.approx((1 + 1 / 2 + 1) / 3)
    right, wrong = math.log(math.exp(5) + 2) - 5, math.log(math.exp(5) + 2)
    assert found['loss'] == pytest.approx((4 * right + wrong) / 5, rel=1e-5)


def test_shares_lie_between_zero_and_one() -> None:
    task = make_task('mqar', {'vocabulary': 16, 'length': 8, 'pairs': 2, 'test_rows': 4})
    measures = task.evaluate(prepared_model(task, {'dim': 8, 'depth': 1, 'heads': 1}, 0, 'cpu'))
    assert set(measures) == SHARES | {'loss'}
    assert all(0 <= measures[name] <= 1 for name in SHARES)
    ranges = {cls.metric: cls().metric_range() for cls in CLASSES}
    assert ranges == {'accuracy': (0.0, 1.0), 'balanced_accuracy': (0.0, 1.0), 'bits': (-math.inf, math.inf)}


def test_logits_of_asked_positions_are_those_of_the_whole_network() -> None:
    task = make_task('mqar', {'vocabulary': 32, 'length': 16, 'pairs': 2, 'rows_per_step': 4})
    model = task.model({'dim': 16, 'depth': 1, 'heads': 2})
    batch = task.batch(0, 0)
    logits, targets = model.answers(batch)
    whole = model.net(batch.inputs)[batch.targets != IGNORE]
    assert torch.allclose(logits, whole, atol=1e-6)
    assert torch.equal(targets, batch.targets[batch.targets != IGNORE])


@pytest.mark.parametrize('flags', [{'multi_token_heads': 3}, {'ff_experts': 4}])
@pytest.mark.parametrize('name', ['bytes', 'mqar', 'mqar/stacked'])
def test_losses_of_a_network_are_added_in_training_alone(name: str, flags: dict[str, Any]) -> None:
    task = make_task(name, {'rows_per_step': 4, 'test_rows': 4, **SMALL.get(name, {})})
    base = {'dim': 16, 'depth': 1, 'heads': 2}
    plain, model = prepared_model(task, base, 0, 'cpu'), prepared_model(task, {**base, **flags}, 0, 'cpu')
    before, after = (dict(each.named_parameters()) for each in (plain, model))
    assert after.keys() - before.keys()
    assert all(torch.equal(p, after[at]) for at, p in before.items() if at in after and p.shape == after[at].shape)
    batch = task.batch(0, 0)
    logits, targets = model.answers(batch)
    inputs, keywords = model.given(batch)
    own = torch.nn.functional.cross_entropy(logits, targets)
    if 'ff_experts' in flags:
        more = model.net(inputs, return_intermediates=True, **keywords)[1].expert_loss
    else:
        # the head of the token i places further is asked what is asked i places later
        heads = model.net(inputs, return_multi_token_logits=True, **keywords)
        assert torch.allclose(heads[0][batch.targets != IGNORE], logits, atol=1e-5)
        later = [(head[:, :-i], batch.targets[:, i:]) for i, head in enumerate(heads) if i]
        more = sum(torch.nn.functional.cross_entropy(a.flatten(0, 1), b.flatten(), ignore_index=IGNORE) for a, b in later)
    assert model(batch).item() == pytest.approx((own + more).item(), rel=1e-5)
    alone = torch.nn.functional.cross_entropy(*model.answers(task.test())).item()
    assert task.evaluate(model)['loss'] == pytest.approx(alone, rel=1e-5)


def test_how_a_task_is_trained_makes_no_other_task_of_it() -> None:
    plain = make_task('mqar', {})
    assert make_task('mqar', {'steps': plain.steps + 1, 'lr': 2 * plain.lr}).options() == plain.options()
    assert make_task('mqar', {'pairs': plain.pairs + 1}).options() != plain.options()


def test_options_tell_own_tasks_apart(tmp_path: Any) -> None:
    path = tmp_path / 'own.py'
    text = (
        'from dataclasses import dataclass\nfrom x_transformers.evidence.tasks.recall import Recall\n'
        '@dataclass(frozen=True, kw_only=True)\nclass Mine(Recall):\n    name = "mine"\n    pairs: int = {}\n'
    )
    path.write_text(text.format(2))
    first = make_task(f'{path}:Mine').options()
    assert first['pairs'] == 2
    assert first['source']
    path.write_text(text.format(3))
    second = make_task(f'{path}:Mine', {'pairs': 2}).options()
    assert dataclasses.asdict(make_task(f'{path}:Mine'))['pairs'] == 3
    assert first != second
