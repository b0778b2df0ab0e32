from __future__ import annotations

import math

import pytest
import torch

from x_transformers.generation.prompts import GenerateError
from x_transformers.generation.sampling import (
    FILTER_LOGITS_FN,
    Sampler,
    contrastive_decode_fn,
    gumbel_noise,
    gumbel_sample,
    min_p,
    pick_token,
    resolve_filter,
    top_a,
    top_k,
    top_p,
)

SHAPES = [(9,), (4, 9), (2, 3, 9), (2, 2, 2, 9)]


def kept_by_hand(name: str, row: list[float], **options: float) -> set[int]:
    """The definitions of the filters, one row at a time."""
    total = sum(math.exp(v) for v in row)
    p = [math.exp(v) / total for v in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if name == 'top_k':
        k = options.get('k', math.ceil(options.get('frac_num_tokens', 0.1) * len(row)))
        return set(order[: int(k)])
    if name == 'top_p':
        kept, mass = set(), 0.0
        for i in order:
            if mass > options.get('thres', 0.9):
                break
            kept.add(i)
            mass += p[i]
        return kept
    if name == 'top_a':
        limit = options.get('min_p_ratio', 0.02) * max(p) ** options.get('min_p_pow', 2.0)
    else:
        limit = options.get('min_p', 0.1) * max(p)
    return {i for i in range(len(row)) if p[i] >= limit}


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('top_k', {}),
        ('top_k', {'k': 3}),
        ('top_k', {'k': 50}),
        ('top_k', {'frac_num_tokens': 0.34}),
        ('top_p', {}),
        ('top_p', {'thres': 0.3}),
        ('top_p', {'thres': 0.0}),
        ('top_a', {}),
        ('top_a', {'min_p_pow': 1.0, 'min_p_ratio': 0.3}),
        ('min_p', {}),
        ('min_p', {'min_p': 0.5}),
    ],
)
def test_filters_keep_what_their_definition_says(shape: tuple[int, ...], name: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape).double() * 2
    before = logits.clone()
    out = FILTER_LOGITS_FN[name](logits, **options)
    assert torch.equal(logits, before)
    assert out.shape == logits.shape
    for row, got in zip(logits.view(-1, 9).tolist(), out.view(-1, 9), strict=True):
        kept = kept_by_hand(name, row, **options)
        assert set(torch.isfinite(got).nonzero().flatten().tolist()) == kept
        assert all(got[i].item() == row[i] for i in kept)
        assert got[torch.isinf(got)].lt(0).all()


def test_top_k_must_keep_something() -> None:
    with pytest.raises(ValueError, match='k=0'):
        top_k(torch.randn(2, 3), k=0)


def test_filters_by_name() -> None:
    assert [resolve_filter(name) for name in ('top_k', 'top_p', 'top_a', 'min_p')] == [top_k, top_p, top_a, min_p]
    assert resolve_filter(len) is len
    with pytest.raises(GenerateError, match=r"top_p.*'nucleus'"):
        resolve_filter('nucleus')


@pytest.mark.parametrize('alpha', [0.1, torch.tensor(0.1)])
def test_contrastive_definition(alpha: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    expert, amateur = torch.randn(3, 8) * 3, torch.randn(3, 8)
    out = contrastive_decode_fn(expert, amateur, alpha=alpha, beta=0.7)
    for e, a, got in zip(expert, amateur, out, strict=True):
        for i in range(8):
            if e[i] < math.log(0.1) + e.max():
                assert got[i] == torch.finfo(torch.float32).min
            else:
                assert torch.isclose(got[i], 1.7 * e[i] - 0.7 * a[i], atol=1e-5)


def test_contrast_without_a_limit_and_with_another_vocabulary() -> None:
    expert, amateur = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.allclose(contrastive_decode_fn(expert, amateur, alpha=0.0), 1.5 * expert - 0.5 * amateur)
    with pytest.raises(ValueError, match='vocabulary'):
        contrastive_decode_fn(expert, torch.randn(2, 6))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    n = counts.sum()
    return float(((counts - n * expected) ** 2 / (n * expected)).sum())


@pytest.mark.parametrize('temperature', [1.0, 0.5, 2.0])
def test_gumbel_samples_follow_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    got = gumbel_sample(logits.expand(40_000, -1), temperature)
    # 3 degrees of freedom: 21.1 is exceeded once in ten thousand times
    assert chi_square(torch.bincount(got, minlength=4).double(), (logits / temperature).softmax(-1).double()) < 21.1


def test_gumbel_noise_has_the_gumbel_moments() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(200_000))
    assert abs(noise.mean() - 0.5772) < 5 * 1.2825 / 200_000**0.5
    assert abs(noise.std() - 1.2825) < 0.03
    again = gumbel_noise(torch.zeros(3), torch.Generator().manual_seed(1))
    assert torch.equal(again, gumbel_noise(torch.zeros(3), torch.Generator().manual_seed(1)))


def test_the_filter_sees_the_logits_before_the_temperature() -> None:
    logits = torch.randn(2, 9)
    sampler = Sampler(0.1, min_p, {'min_p': 0.3})
    assert torch.allclose(sampler.probs(logits), (min_p(logits, 0.3) / 0.1).softmax(-1))


def test_temperature_zero_ignores_the_filter() -> None:
    def worst(logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError('must not be called')

    logits = torch.randn(5, 9)
    sampler = Sampler(0.0, worst)
    assert torch.equal(sampler(logits), logits.argmax(-1))
    assert torch.equal(sampler.probs(logits).argmax(-1), logits.argmax(-1))
    assert torch.equal(pick_token(logits, 0.0), logits.argmax(-1))
    with pytest.raises(ValueError, match='temperature'):
        Sampler(-0.5)
