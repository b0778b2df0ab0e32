"""Each function against scipy or a brute-force simulation, and the calibration of the verdicts."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from x_transformers.evidence import statistics as our
from x_transformers.evidence.statistics import bca, compare, holm, moderated_variance, paired_t, sign_flip


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# ---------------------------------------------------------------- functions


def test_paired_t_is_that_of_scipy() -> None:
    values = draw(2, 7).tolist()
    differences = [a - b for a, b in zip(*values, strict=True)]
    mean, low, high, p = paired_t(differences)
    theirs = stats.ttest_rel(*values)
    interval = theirs.confidence_interval(0.95)
    assert p == pytest.approx(theirs.pvalue)
    assert (low, high) == pytest.approx((interval.low, interval.high))
    assert mean == pytest.approx(sum(differences) / 7)


def test_one_arm_is_judged_by_the_ordinary_paired_test() -> None:
    base, arm = draw(2, 5, seed=1).tolist()
    found = compare(base, [arm], margin=0.1)[0]
    mean, low, high, p = paired_t([a - b for a, b in zip(arm, base, strict=True)])
    assert (found.mean, found.low, found.high, found.p, found.p_holm) == pytest.approx((mean, low, high, p, p))
    assert found.dof == 4


def test_holm_by_hand_and_against_a_loop() -> None:
    assert holm(torch.tensor([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    p = torch.rand(200, generator=torch.Generator().manual_seed(2))
    order = sorted(range(200), key=lambda k: float(p[k]))
    expected, largest = [0.0] * 200, 0.0
    for place, k in enumerate(order):
        largest = max(largest, (200 - place) * float(p[k]))
        expected[k] = min(1.0, largest)
    assert holm(p).tolist() == pytest.approx(expected)


def test_equivalence_is_two_tests_of_scipy() -> None:
    values = 0.1 * draw(8, seed=3)
    error = float(values.std() / math.sqrt(8))
    ours = our.equivalence_p(float(values.mean()), error, 7, 0.2)
    low = stats.ttest_1samp(values.numpy(), -0.2, alternative='greater').pvalue
    high = stats.ttest_1samp(values.numpy(), 0.2, alternative='less').pvalue
    assert ours == pytest.approx(max(low, high))


def test_sign_flip_counts_all_signs() -> None:
    values = (draw(7, seed=4) + 0.5).tolist()
    count = sum(
        abs(sum(v if (mask >> k) & 1 else -v for k, v in enumerate(values))) >= abs(sum(values)) - 1e-12 for mask in range(128)
    )
    assert sign_flip(values) == pytest.approx(count / 128)
    assert sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.0625)


def test_bca_is_near_that_of_scipy() -> None:
    values = draw(25, seed=5).exp()
    low, high = bca(values.tolist(), rounds=20_000)
    theirs = stats.bootstrap((values.numpy(),), lambda x, axis: x.mean(axis=axis), method='BCa', n_resamples=20_000, rng=0)
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * spread)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * spread)


@pytest.mark.parametrize(('difference', 'seeds', 'arms'), [(1.5, 5, 1), (2.0, 4, 3), (0.8, 12, 1)])
def test_power_is_what_a_simulation_finds(difference: float, seeds: int, arms: int) -> None:
    values = difference + draw(40_000, seeds, seed=6)
    t = values.mean(dim=1) / (values.std(dim=1) / math.sqrt(seeds))
    found = float((t.abs() > our.t_quantile(1 - our.VERDICT / 2 / arms, seeds - 1)).double().mean())
    assert our.power_of(difference, 1.0, seeds, arms) == pytest.approx(found, abs=0.01)


def test_seeds_for_a_difference_are_the_fewest() -> None:
    seeds = our.seeds_for(0.5, 1.0)
    assert seeds is not None
    assert our.power_of(0.5, 1.0, seeds) >= 0.8 > our.power_of(0.5, 1.0, seeds - 1)
    assert our.seeds_for(0.0, 1.0) is None
    assert our.seeds_to_settle(0.0, 1.0, margin=0.5) == our.smallest(
        lambda n: our.equivalence_p(0.0, 1 / math.sqrt(n), n - 1, 0.5) < 0.05
    )


def test_inverse_of_the_trigamma_function() -> None:
    x = torch.tensor([0.1, 0.5, 1.0, 3.0, 40.0, 500.0], dtype=torch.double)
    assert our.inverse_trigamma(torch.special.polygamma(1, x)).tolist() == pytest.approx(x.tolist(), rel=1e-6)


def test_moderated_variances_lie_between_the_own_and_the_pooled_one() -> None:
    differences = draw(6, 5, seed=7)
    found = moderated_variance(differences)
    own, pooled = differences.var(dim=1), differences.var(dim=1).mean()
    calm = ~found.outlying
    assert bool((found.variance[calm] >= own[calm] - 1e-12).all())
    assert bool((found.variance[calm] <= torch.maximum(own, pooled)[calm] + 1e-12).all())
    assert bool((found.dof >= 4).all())
    assert bool((found.dof <= 24).all())


def test_an_arm_of_far_larger_spread_is_judged_by_its_own() -> None:
    differences = draw(10, 5, seed=8)
    differences[3] *= 30
    found = moderated_variance(differences)
    assert found.outlying.nonzero()[:, 0].tolist() == [3]
    assert float(found.variance[3]) == pytest.approx(float(differences[3].var()))
    assert float(found.dof[3]) == 4
    assert float(found.variance[0]) < 10


def test_two_arms_are_judged_each_by_its_own() -> None:
    differences = draw(2, 5, seed=11)
    found = moderated_variance(differences)
    assert found.variance.tolist() == pytest.approx(differences.var(dim=1).tolist())
    assert found.dof.tolist() == [4, 4]


# ---------------------------------------------------------------- verdicts


def test_verdicts_in_their_order() -> None:
    base = [1.0, 1.1, 0.9, 1.05, 0.95]
    noise = [0.001, -0.001, 0.002, -0.002, 0.0]
    better = [b + 0.5 + e for b, e in zip(base, noise, strict=True)]
    little = [b + 0.01 + e for b, e in zip(base, noise, strict=True)]
    equal = [b + e for b, e in zip(base, noise[::-1], strict=True)]
    wild = [b + 3 * e for b, e in zip(base, (1, -1, 0.5, -0.2, 0.1), strict=True)]
    found = compare(base, [better], margin=0.05)[0]
    assert (found.verdict, found.smaller_than_margin) == ('helps', False)
    found = compare(base, [better], margin=0.05, better='lower')[0]
    assert found.verdict == 'hurts'
    found = compare(base, [little], margin=0.05)[0]
    assert (found.verdict, found.smaller_than_margin) == ('helps', True)
    assert compare(base, [equal], margin=0.05)[0].verdict == 'no difference'
    found = compare(base, [wild], margin=0.05)[0]
    assert found.verdict == 'not resolved'
    assert found.needs is not None
    assert found.needs > 5


def test_an_identical_arm_is_no_difference_and_takes_no_part_in_the_family() -> None:
    base = draw(5, seed=9).tolist()
    arm = [b + 0.4 + e for b, e in zip(base, (0.1, -0.1, 0.05, 0.0, -0.05), strict=True)]
    alone = compare(base, [arm], margin=0.1)[0]
    both = compare(base, [base, arm], margin=0.1, identical=[True, False])
    assert both[0].verdict == 'no difference'
    assert both[0].identical
    assert both[1] == alone


def test_a_rounded_accuracy_has_at_least_the_variance_of_its_rounding() -> None:
    found = compare([0.50, 0.50, 0.50], [[0.51, 0.51, 0.51]], margin=0.02, resolution=0.01)[0]
    assert found.deviation == pytest.approx(0.01 / math.sqrt(6))
    assert found.p > 0


def test_differences_of_the_size_of_rounding_are_none() -> None:
    found = compare([3.5, 3.6], [[3.49999, 3.59999]], margin=0.01, better='lower')[0]
    assert found.verdict == 'no difference'


def test_one_seed_resolves_nothing() -> None:
    found = compare([0.5], [[0.9]], margin=0.1)[0]
    assert found.verdict == 'not resolved'
    assert math.isnan(found.low)


def test_pairing_is_reported() -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    arm = base + 0.1 * draw(5, seed=10).float()
    found = compare(base.tolist(), [arm.tolist()], margin=0.1)[0]
    assert found.pairing_removed is not None
    assert found.pairing_removed > 0.95


def test_intervals_end_where_the_metric_ends() -> None:
    values = [0.97, 1.0, 0.99]
    interval = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert interval[1] > 1
    assert our.mean_interval(values, (0.0, 1.0)) == pytest.approx((interval[0], 1.0))
    assert our.mean_interval(values, (-math.inf, math.inf)) == pytest.approx(interval)
    # differences of shares lie between -1 and 1; the probability is that of the whole interval
    apart = [0.05, 0.99]
    free, cut = (compare([0.0, 0.0], [apart], margin=0.1, largest=most)[0] for most in (math.inf, 1.0))
    assert free.low < -1
    assert free.high > 1
    assert (cut.low, cut.high) == (-1.0, 1.0)
    assert (cut.p, cut.mean, cut.verdict) == (free.p, free.mean, free.verdict)


def test_margin_is_two_sigma_or_half_a_point() -> None:
    assert our.margin_of([0.5, 0.5, 0.5], accuracy=True) == pytest.approx(0.005)
    assert our.margin_of([2.0, 2.0, 2.0], accuracy=False) == pytest.approx(0.01)
    assert our.margin_of([1.0, 2.0, 3.0], accuracy=False) == pytest.approx(2.0)


# ---------------------------------------------------------------- calibration

FAMILIES, SEEDS = 1000, 5


def families(arms: int, shared: bool, seed: int, count: int = FAMILIES, seeds: int = SEEDS) -> torch.Tensor:
    """Paired differences of unit deviation without any difference; shared: all arms have one baseline, as in an experiment."""
    arm = draw(count, arms, seeds, seed=seed)
    return (arm - draw(count, 1, seeds, seed=seed + 1)) / math.sqrt(2) if shared else arm


def false_verdicts(differences: torch.Tensor) -> float:
    p, _ = our.two_sided(differences)
    return float((holm(p) < our.VERDICT).any(dim=-1).double().mean())


@pytest.mark.parametrize('arms', [1, 3, 20])
@pytest.mark.parametrize('shared', [True, False])
def test_a_thousand_families_without_a_difference(arms: int, shared: bool) -> None:
    assert false_verdicts(families(arms, shared, seed=100 + arms)) <= 0.05


@pytest.mark.parametrize('arms', [3, 20])
@pytest.mark.parametrize('shared', [True, False])
def test_a_thousand_families_with_an_arm_of_fivefold_spread(arms: int, shared: bool) -> None:
    differences = families(arms, shared, seed=200 + arms)
    differences[:, 0] *= 5
    assert false_verdicts(differences) <= 0.05


@pytest.mark.parametrize('arms', [1, 3, 20])
@pytest.mark.parametrize('shared', [True, False])
def test_three_sigma_are_found_with_five_seeds(arms: int, shared: bool) -> None:
    differences = families(arms, shared, seed=300 + arms)
    differences[:, 0] += 3
    p, _ = our.two_sided(differences)
    assert float((holm(p)[:, 0] < our.VERDICT).double().mean()) >= 0.9


@pytest.mark.parametrize('arms', [1, 3, 20])
@pytest.mark.parametrize('shared', [True, False])
def test_intervals_cover(arms: int, shared: bool) -> None:
    differences = families(arms, shared, seed=400 + arms, count=4000)
    _, found = our.two_sided(differences)
    half = torch.as_tensor(stats.t.ppf(0.975, found.dof.numpy())) * (found.variance / SEEDS).sqrt()
    assert 0.93 <= float((differences.mean(dim=-1).abs() <= half).double().mean()) <= 0.97


@pytest.mark.parametrize('arms', [1, 3, 20])
@pytest.mark.parametrize('seeds', [3, 5, 10])
def test_the_rate_of_false_verdicts_over_many_families(arms: int, seeds: int) -> None:
    """Twenty thousand: the true rate, up to three standard errors of the simulation."""
    for shared in (True, False):
        rate = false_verdicts(families(arms, shared, seed=500 + arms + seeds, count=20_000, seeds=seeds))
        assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 20_000)


def test_many_families_at_once_equal_each_alone() -> None:
    differences = families(4, True, seed=600, count=20)
    many = our.moderated_variances(differences)
    for index in range(20):
        alone = moderated_variance(differences[index])
        assert many.variance[index].tolist() == pytest.approx(alone.variance.tolist())
        assert many.dof[index].tolist() == pytest.approx(alone.dof.tolist())
