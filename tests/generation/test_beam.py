from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.generation.toys import OldToy, Toy
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

PROMPT = torch.tensor([[1, 2, 0], [2, 0, 1]])


def score(net: Toy, prompt: list[int], made: list[int], eos: int | None = None, **given: Tensor) -> float:
    total, seen = 0.0, list(prompt)
    with torch.no_grad():
        for token in made:
            total += float(net.eval()(torch.tensor([seen]), **given)[0, -1].log_softmax(-1)[token])
            seen.append(token)
            if token == eos:
                break
    return total


def exhaustive(
    net: Toy, prompt: list[int], steps: int, eos: int | None = None, **given: Tensor
) -> list[tuple[float, list[int]]]:
    """Every sequence with its score, best first; what follows an end token is padding."""
    found = {}
    for made in itertools.product(range(net.num_tokens), repeat=steps):
        row = list(made)
        if eos in row:
            end = row.index(eos) + 1
            row = row[:end] + [0] * (steps - end)
        found[tuple(row)] = row
    return sorted(((score(net, prompt, row, eos, **given), row) for row in found.values()), key=lambda pair: -pair[0])


@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_a_wide_beam_is_an_exhaustive_search(seed: int, cache_kv: bool) -> None:
    net = Toy(vocabulary=3, seed=seed)
    found, scores = AutoregressiveWrapper(net).beam_search(PROMPT, 3, beams=27, return_beams_and_scores=True, cache_kv=cache_kv)
    assert found.shape == (27, 2, 3)
    for row in range(2):
        expected = exhaustive(net, PROMPT[row].tolist(), 3)
        assert torch.allclose(scores[:, row], torch.tensor([s for s, _ in expected]), atol=1e-4)
        assert found[0, row].tolist() == expected[0][1]


@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_ended_hypotheses_are_frozen(seed: int, cache_kv: bool) -> None:
    net = Toy(vocabulary=3, seed=seed)
    expected = exhaustive(net, PROMPT[0].tolist(), 3, eos=1)
    best, scores = AutoregressiveWrapper(net).beam_search(
        PROMPT[0], 3, beams=27, return_beams_and_scores=True, eos_token=1, cache_kv=cache_kv
    )
    assert best.shape == (27, 3)
    n = len(expected)
    assert torch.allclose(scores[:n], torch.tensor([s for s, _ in expected]), atol=1e-4)
    assert scores[n:].eq(-torch.inf).all()
    assert best[0].tolist() == expected[0][1]


def textbook(net: Toy, prompt: list[int], steps: int, beams: int, limit: int = 99) -> list[tuple[float, list[int]]]:
    alive = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for total, made in alive:
            with torch.no_grad():
                log_probs = net.eval()(torch.tensor([[*prompt, *made][-limit:]]))[0, -1].log_softmax(-1).tolist()
            grown += [(total + gain, [*made, token]) for token, gain in enumerate(log_probs)]
        alive = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return alive


@pytest.mark.parametrize('kind', ['new', 'old'])
@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('limit', [32, 4])
@pytest.mark.parametrize('seed', range(5))
def test_narrow_beams_equal_the_textbook(kind: str, seed: int, cache_kv: bool, limit: int) -> None:
    net = Toy(seed=seed, limit=limit)
    model = AutoregressiveWrapper(net if kind == 'new' else OldToy(net))
    found, scores = model.beam_search(PROMPT, 6, beams=3, return_beams_and_scores=True, cache_kv=cache_kv)
    for row in range(2):
        expected = textbook(net, PROMPT[row].tolist(), 6, 3, limit)
        assert torch.allclose(scores[:, row], torch.tensor([s for s, _ in expected]), atol=1e-4)
        assert found[:, row].tolist() == [made for _, made in expected]
    assert torch.equal(model.beam_search(PROMPT, 6, beams=3, cache_kv=cache_kv), found[0])


def test_one_beam_is_greedy() -> None:
    model = AutoregressiveWrapper(Toy())
    assert torch.equal(model.beam_search(PROMPT, 6, beams=1), model.generate(PROMPT, 6, temperature=0.0))


@pytest.mark.parametrize('cache_kv', [True, False])
def test_lengths_context_and_prefix_follow_their_beam(cache_kv: bool) -> None:
    net = Toy()
    made = torch.Generator().manual_seed(0)
    given = {
        'context': torch.randn(2, 4, 8, generator=made) * 3,
        'prepend_embeds': torch.randn(2, 2, 8, generator=made),
    }
    model = AutoregressiveWrapper(net)
    found, scores = model.beam_search(PROMPT, 4, beams=3, return_beams_and_scores=True, cache_kv=cache_kv, **given)
    for row in range(2):
        own = {name: t[row : row + 1] for name, t in given.items()}
        alone, own_scores = model.beam_search(PROMPT[row], 4, beams=3, return_beams_and_scores=True, cache_kv=False, **own)
        assert torch.equal(found[:, row], alone)
        assert torch.allclose(scores[:, row], own_scores, atol=1e-4)
        assert abs(score(net, PROMPT[row].tolist(), alone[0].tolist(), **own) - own_scores[0]) < 1e-4
    ragged = model.beam_search(PROMPT, 4, beams=3, prompt_lens=torch.tensor([3, 2]), cache_kv=cache_kv)
    assert torch.equal(ragged[1], model.beam_search(PROMPT[1, :2], 4, beams=3))


def test_leading_axes_stand_behind_the_beams() -> None:
    model = AutoregressiveWrapper(Toy())
    flat, flat_scores = model.beam_search(PROMPT, 3, return_beams_and_scores=True)
    found, scores = model.beam_search(PROMPT[:, None], 3, return_beams_and_scores=True)
    assert torch.equal(found, flat[:, :, None])
    assert torch.equal(scores, flat_scores[:, :, None])
    assert model.beam_search(PROMPT[0], 3).shape == (3,)
    assert torch.equal(model.beam_search(PROMPT, 3, include_prompt=True)[:, :3], PROMPT)
    empty, zeros = model.beam_search(PROMPT, 0, beams=2, return_beams_and_scores=True)
    assert (empty.shape, zeros.shape) == ((2, 2, 0), (2, 2))


def test_length_penalty_prefers_longer() -> None:
    net = Toy(vocabulary=3)
    model = AutoregressiveWrapper(net)
    found, scores = model.beam_search(PROMPT[0], 3, beams=27, eos_token=2, return_beams_and_scores=True, length_penalty=1.0)
    for made, got in zip(found.tolist(), scores.tolist(), strict=True):
        if got == float('-inf'):
            continue
        length = made.index(2) + 1 if 2 in made else 3
        assert abs(got - score(net, PROMPT[0].tolist(), made, eos=2) / length) < 1e-4
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


@pytest.mark.parametrize('steps', [1, 4])
def test_stochastic_beams_are_sorted_and_scored_plainly(steps: int) -> None:
    net = Toy()
    model = AutoregressiveWrapper(net)
    found, scores = model.beam_search(
        PROMPT, steps, beams=4, stochastic=True, return_beams_and_scores=True, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(scores, scores.sort(0, descending=True).values)
    for beam, row in itertools.product(range(4), range(2)):
        assert abs(score(net, PROMPT[row].tolist(), found[beam, row].tolist()) - scores[beam, row]) < 1e-4
    assert len({tuple(t) for t in found[:, 0].tolist()}) == 4


def test_stochastic_beams_are_samples_without_replacement() -> None:
    """One step, one beam of two: the first proposal is a plain sample, so both together hold token t with known chance."""
    net = Toy(vocabulary=3)
    torch.manual_seed(0)
    n = 20_000
    found, _ = AutoregressiveWrapper(net).beam_search(
        PROMPT[:1].expand(n, -1), 1, beams=2, stochastic=True, return_beams_and_scores=True
    )
    with torch.no_grad():
        p = net.eval()(PROMPT[:1])[0, -1].softmax(-1).tolist()
    for t in range(3):
        chance = p[t] + sum(p[o] * p[t] / (1 - p[o]) for o in range(3) if o != t)
        got = (found[..., 0] == t).any(0).float().mean().item()
        assert abs(got - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_a_filter_limits_stochastic_beams() -> None:
    net = Toy()
    found = AutoregressiveWrapper(net).beam_search(
        PROMPT, 3, beams=3, stochastic=True, filter_logits_fn='top_k', filter_kwargs={'k': 1}
    )
    assert torch.equal(found, AutoregressiveWrapper(net).generate(PROMPT, 3, temperature=0.0))


def test_bad_beams() -> None:
    model = AutoregressiveWrapper(Toy(vocabulary=3))
    with pytest.raises(ValueError, match=r'beams=0.*at least 1'):
        model.beam_search(PROMPT, 3, beams=0)
    with pytest.raises(ValueError, match='at most 9, the number of sequences of length 2'):
        model.beam_search(PROMPT, 2, beams=10)
    with pytest.raises(AssertionError, match='rotary'):
        AutoregressiveWrapper(Toy(absolute=True, limit=4)).beam_search(PROMPT, 3)
