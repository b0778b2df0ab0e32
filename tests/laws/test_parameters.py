"""Every parameter of every objective and of every model around a stack, and of their calls, changes something or warns."""

from __future__ import annotations

import inspect
import random
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import x_transformers
from tests.citations import pieces
from tests.laws.later_parameters import LATER
from tests.laws.parameters import MODELS, OBJECTIVES, Sampled, Target, With, options_of, seen
from tests.laws.test_laws import COUNT, SEED
from x_transformers import InertFlagWarning

TARGETS = (*OBJECTIVES, *LATER, *MODELS)
PACKAGE = Path(x_transformers.__file__).parent


def parameters(target: Target) -> dict[str, inspect.Parameter]:
    """Those that must change something, by the signature."""
    every = inspect.signature(target.of).parameters
    return {
        name: parameter
        for name, parameter in every.items()
        if name != 'self' and name not in target.fixed and parameter.kind is not parameter.VAR_KEYWORD
    }


def variant(target: Target, name: str, default: Any) -> With:
    """A value other than the default: the one that is named, or the other of two, or a larger number."""
    if name in target.values:
        value = target.values[name]
        return value if isinstance(value, With) else With(value)
    if isinstance(default, bool):
        return With(not default)
    pytest.fail(f'{target}: tests/laws/parameters.py must name a value for {name}, or why it changes nothing')


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        isinstance(left, Tensor) == isinstance(right, Tensor)
        and (
            left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
            if isinstance(left, Tensor)
            else left == right
        )
        for left, right in zip(one, other, strict=True)
    )  # fmt: skip


def given(value: With) -> Any:
    return value.value() if isinstance(value, Sampled) else value.value


CASES = [(target, name) for target in TARGETS for name in parameters(target) if name not in target.idle]


@pytest.mark.parametrize(('target', 'name'), CASES, ids=str)
def test_every_parameter_changes_something(target: Target, name: str) -> None:
    chosen = variant(target, name, parameters(target)[name].default)
    plain = seen(target, chosen.beside)
    assert same(plain, seen(target, chosen.beside)), f'{target}: two calls differ, so that nothing can be said of {name}'
    try:
        changed = seen(target, chosen.beside | {name: given(chosen)})
    except InertFlagWarning:
        return
    assert not same(plain, changed), f'{target}: {name} changes nothing and does not warn'


# what no number, switch or word can be
SENSELESS = ([1], {'a': 1}, object(), float('nan'))


@pytest.mark.parametrize(('target', 'name'), [(t, name) for t in (*OBJECTIVES, *LATER) for name in options_of(t.of)], ids=str)
def test_what_an_option_cannot_be_is_told_by_its_name(target: Target, name: str) -> None:
    chosen = target.values.get(name)
    beside = chosen.beside if isinstance(chosen, With) else {}
    several = 'Sequence[int]' in str(inspect.signature(target.of).parameters[name].annotation)
    for value in SENSELESS[several:]:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            seen(target, beside | {name: value})
        assert Path(caught.traceback[-1].path).is_relative_to(PACKAGE), f'{target}: {name}={value!r} is told from deep below'


def together(target: Target, rng: random.Random) -> dict[str, Any]:
    """Several parameters at once, each with what must stand beside it."""
    named = {name: p.default for name, p in parameters(target).items() if name in target.values or isinstance(p.default, bool)}
    # a program takes a minute to be made
    chosen = {name: variant(target, name, default) for name, default in named.items() if name != 'compile'}
    names = rng.sample(sorted(chosen), min(len(chosen), rng.choice((2, 2, 3, 4, 5))))
    beside = {key: value for name in names for key, value in chosen[name].beside.items()}
    return beside | {name: given(chosen[name]) for name in names}


def runs_or_is_refused(target: Target, number: int) -> None:
    told = together(target, random.Random(f'{SEED} {target} {number}'))
    try:
        seen(target, told)
    except (ValueError, TypeError) as error:
        if not Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE):
            pytest.fail(f'{target} with {sorted(told)}: from deep below: {error}')


@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_some_parameters_together_run_or_are_refused_by_a_sentence(target: Target) -> None:
    runs_or_is_refused(target, 0)


@pytest.mark.deep
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_many_parameters_together_run_or_are_refused_by_a_sentence(target: Target) -> None:
    for number in range(1, 1 + max(COUNT // 100, 5)):
        runs_or_is_refused(target, number)


@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_what_is_said_of_parameters_is_of_some_that_there_are(target: Target) -> None:
    names = set(inspect.signature(target.of).parameters)
    assert set(target.values) | set(target.fixed) | set(target.idle) <= names
    for why in target.idle.values():
        for word in why.replace(',', ' ').split():
            if word.startswith('tests/'):
                path, _, test = word.partition('::')
                assert test in pieces(path) if test else pieces(path)
