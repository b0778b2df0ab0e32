from __future__ import annotations

import itertools

import pytest
import torch

from tests.generation.toys import OldToy, Toy
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.sampling import Sampler, top_k
from x_transformers.generation.speculative import Draft, LookupDrafter, ModelDrafter, Tally, accept_guesses, speculate

PROMPT = torch.tensor([[1, 2, 0], [2, 0, 1]])


def chance_of(net: Toy, prompt: list[int], made: tuple[int, ...], sampler: Sampler) -> float:
    total, seen = 1.0, list(prompt)
    with torch.no_grad():
        for token in made:
            total *= float(sampler.probs(net.eval()(torch.tensor([seen]))[0, -1])[token])
            seen.append(token)
    return total


@pytest.mark.parametrize('lookahead', [1, 3])
@pytest.mark.parametrize('guess', ['model', 'filtered', 'lookup'])
def test_the_distribution_is_that_of_plain_sampling(guess: str, lookahead: int) -> None:
    """All 27 sequences of three tokens, 6,000 of them drawn: a chi-square test against the exact chances."""
    net = Toy(vocabulary=3, seed=1)
    given = {'filter_logits_fn': 'top_k', 'filter_kwargs': {'k': 2 if guess == 'filtered' else 3}, 'temperature': 1.3}
    sampler = Sampler(1.3, top_k, given['filter_kwargs'])
    speculation = {'prompt_lookup': 1} if guess == 'lookup' else {'draft_model': Toy(vocabulary=3, seed=2)}
    model = AutoregressiveWrapper(net)
    torch.manual_seed(lookahead)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.product(range(3), repeat=3), 0)
    prompt = torch.tensor([1, 2, 1])
    # the rows of a batch go on together; small batches accept more guesses, large ones give numbers
    sizes = [2] * 250 + [10] * 50 + [500] * 10
    n = sum(sizes)
    many = [model.generate(prompt.expand(rows, -1), 3, lookahead=lookahead, **given, **speculation) for rows in sizes]
    for made in torch.cat(many).tolist():
        counts[tuple(made)] += 1
    chances = {made: chance_of(net, prompt.tolist(), made, sampler) for made in counts}
    assert abs(sum(chances.values()) - 1) < 1e-4
    possible = [made for made in counts if chances[made] > 1e-9]
    assert all(counts[made] == 0 for made in counts if made not in possible)
    chi = sum((counts[made] - n * chances[made]) ** 2 / (n * chances[made]) for made in possible)
    # exceeded once in ten thousand times: 26 degrees of freedom 61.66, 7 degrees of freedom 29.88
    assert chi < (61.66 if len(possible) == 27 else 29.88)


@pytest.mark.parametrize('guess', ['good', 'bad', 'lookup'])
@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('limit', [64, 8])
def test_greedy_is_plain_greedy(guess: str, cache_kv: bool, limit: int) -> None:
    net = Toy(limit=limit)
    model = AutoregressiveWrapper(net)
    speculation = {'prompt_lookup': 2} if guess == 'lookup' else {'draft_model': Toy(seed=1 if guess == 'good' else 4)}
    expected = model.generate(PROMPT, 20, temperature=0.0)
    out = model.generate(PROMPT, 20, temperature=0.0, cache_kv=cache_kv, **speculation)
    assert torch.equal(out, expected)
    parts = model.stream(PROMPT, 20, temperature=0.0, **speculation)
    assert torch.equal(torch.stack(list(parts), 1), expected)


def test_nets_of_the_older_contract_are_checked_without_a_cache() -> None:
    net = Toy()
    out = AutoregressiveWrapper(OldToy(net)).generate(PROMPT, 8, temperature=0.0, draft_model=OldToy(Toy(seed=2)))
    assert torch.equal(out, AutoregressiveWrapper(net).generate(PROMPT, 8, temperature=0.0))


def test_ragged_prompts_and_ends() -> None:
    net = Toy()
    model = AutoregressiveWrapper(net)
    free = model.generate(PROMPT, 12, temperature=0.0)
    eos = int(free[0, 4])
    expected = model.generate(PROMPT, 12, temperature=0.0, eos_token=eos)
    assert torch.equal(model.generate(PROMPT, 12, temperature=0.0, eos_token=eos, draft_model=Toy(seed=2)), expected)
    prompts = [torch.tensor([1]), torch.tensor([1, 2, 3])]
    expected = model.generate(prompts, 8, temperature=0.0)
    assert torch.equal(model.generate(prompts, 8, temperature=0.0, draft_model=Toy(seed=2)), expected)


def test_a_perfect_draft_saves_passes() -> None:
    net, tally = Toy(), Tally()
    sampler = Sampler(0.0)
    tokens = Tokens(PROMPT)
    drafter = ModelDrafter(Reader(Toy().eval()), sampler)
    made = list(speculate(Reader(net.eval()), drafter, tokens, 20, sampler, lookahead=4, tally=tally))
    assert len(made) == 20
    assert tally.passes == 4
    assert tally.drafted == tally.accepted == 16


@torch.no_grad()
def test_lookup_copies_what_followed() -> None:
    ids = torch.tensor([[5, 1, 2, 3, 4, 1, 2], [1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4, 5, 6, 0]])
    tokens = Tokens(ids)
    assert LookupDrafter(2).draft(tokens, 3).tokens[:2].tolist() == [[3, 4, 1], [2, 1, 2]]
    assert LookupDrafter(2).draft(Tokens(ids[2:]), 3).tokens.shape == (1, 0)
    assert LookupDrafter(2).draft(Tokens(ids[:, :2]), 3).tokens.shape == (3, 0)
    assert LookupDrafter(2).draft(tokens, 0).tokens.shape == (3, 0)


def test_one_check_by_hand() -> None:
    """Certain acceptance where p covers q; certain refusal where p is zero, and then the rest of p."""
    probs = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    drafted = torch.nn.functional.one_hot(torch.tensor([[1, 0]]), 3).float()
    made = accept_guesses(Draft(torch.tensor([[1, 0]]), drafted), probs, Sampler())
    assert (made.accepted, made.following.tolist()) == (1, [2])
    made = accept_guesses(Draft(torch.tensor([[1, 2]])), probs, Sampler())
    assert (made.accepted, made.following.tolist()) == (2, [0])
    made = accept_guesses(Draft(torch.tensor([[0, 2]])), probs, Sampler())
    assert (made.accepted, made.following.tolist()) == (0, [1])
