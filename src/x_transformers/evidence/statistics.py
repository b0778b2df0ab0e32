"""Statistics of paired runs: intervals, corrected probabilities, equivalence, and the number of seeds needed to decide.

Arms are compared with one baseline over the same seeds. The verdict rests on a t test of the paired differences whose variance
is shrunk towards that of all arms (https://doi.org/10.2202/1544-6115.1027), corrected over arms by Holm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from x_transformers.tensor_types import Float
from x_transformers.training.errors import TrainingError

Verdict = Literal['helps', 'hurts', 'no difference', 'not resolved', 'failed']
LEVEL = 0.05
# *helps* and *hurts* take a corrected p below this. The exact test of a single arm errs in just this share of comparisons, and
# of a thousand no more than LEVEL may be wrong: 0.04 leaves room for the chance in the thousand
VERDICT = 0.04
# relative size of differences that the order of a sum can make
ROUNDING = 1e-5
# an arm whose variance is larger than that of the others at this level is judged by its own
OUTLYING = 0.05
# at this level it is left out of the pooled variance too; a milder limit would cut off the largest variances of equal arms
EXCLUDED = 0.001


@cache
def scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise TrainingError("statistics need scipy: pip install 'x-transformers[ablate]'") from error
    return stats


def t_sf(t: float, dof: float) -> float:
    return float(scipy_stats().t.sf(t, dof))


def t_quantile(q: float, dof: float) -> float:
    return float(scipy_stats().t.ppf(q, dof))


# ---------------------------------------------------------------- variances


@dataclass(frozen=True)
class Moderated:
    """The variance of each arm's paired differences, as it is used for tests, and its degrees of freedom."""

    own: Float[Tensor, ' k']
    variance: Float[Tensor, ' k']
    dof: Float[Tensor, ' k']
    outlying: Tensor


def moderated_variance(differences: Float[Tensor, 'k n'], floor: float = 0.0) -> Moderated:
    """Variances of ``k`` arms over ``n`` seeds, each shrunk towards the pooled one.

    Arms are compared with one baseline, so their differences are correlated, and k arms tell less of the common variance than
    k (n - 1) independent numbers would: the degrees of freedom of the pooled variance follow Satterthwaite. An arm is never
    judged by less than its own variance, and one whose variance is far larger than that of the others by its own alone.
    """
    many = moderated_variances(differences[None], floor)
    return Moderated(many.own[0], many.variance[0], many.dof[0], many.outlying[0])


def moderated_variances(differences: Float[Tensor, 'f k n'], floor: float = 0.0) -> Moderated:
    """The same for many families at once."""
    _, arms, seeds = differences.shape
    dof = seeds - 1
    own = differences.var(dim=-1).clamp_min(floor)
    alone = torch.full_like(own, float(dof))
    # how far variances differ cannot be seen from two of them
    if arms < 3 or seeds < 3:
        return Moderated(own, own, alone, torch.zeros_like(own, dtype=torch.bool))
    outlying, excluded = (outlying_arms(own, dof, level) for level in (OUTLYING, EXCLUDED))
    kept = (~excluded).to(own.dtype)
    count = kept.sum(dim=-1, keepdim=True)
    pooled = (own * kept).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    pooled_dof = effective_dof(differences, kept)
    prior = torch.minimum(prior_dof(own, kept, dof), pooled_dof)
    shrunk = (prior * pooled + dof * own) / (prior + dof)
    total = torch.minimum(prior + dof, pooled_dof)
    single = outlying | (count <= 1)
    variance = torch.where(single, own, torch.maximum(own, shrunk))
    return Moderated(own, variance, torch.where(single, alone, total), outlying)


def outlying_arms(own: Float[Tensor, 'f k'], dof: int, level: float) -> Tensor:
    """Arms whose variance is larger than the mean of the others at the level of an F test."""
    arms = own.shape[-1]
    others = (own.sum(dim=-1, keepdim=True) - own) / (arms - 1)
    limit = float(scipy_stats().f.ppf(1 - level, dof, dof * (arms - 1)))
    return own > limit * others


def effective_dof(differences: Float[Tensor, 'f k n'], kept: Float[Tensor, 'f k']) -> Float[Tensor, 'f 1']:
    """Degrees of freedom of the pooled variance of the arms that are kept (Satterthwaite)."""
    dof = differences.shape[-1] - 1
    rest = (differences - differences.mean(dim=-1, keepdim=True)) * kept[..., None]
    # the squared covariance has the same trace on the side of the seeds, which is the smaller one
    small = rest.transpose(-1, -2) @ rest / dof
    trace = small.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    plain = small.square().sum(dim=(-1, -2))
    unbiased = dof**2 / ((dof - 1) * (dof + 2)) * (plain - trace.square() / dof)
    # with few seeds the unbiased estimate is so noisy that its reciprocal promises too much; the plain one is too large.
    # Halfway, the share of false verdicts stays below its level for 3 and 5 seeds and 3 and 20 arms (the tests simulate it)
    square = (plain + unbiased) / 2
    most = kept.sum(dim=-1) * dof
    found = dof * trace.square() / square.clamp_min(1e-300)
    bounded = torch.minimum(found.clamp_min(dof), most)
    return torch.where(square > 0, bounded, most).clamp_min(dof).unsqueeze(-1)


def prior_dof(own: Float[Tensor, 'f k'], kept: Float[Tensor, 'f k'], dof: int) -> Float[Tensor, 'f 1']:
    """How far the spread of the logarithms of variances is explained by chance: Smyth's d0, infinite where it all is."""
    log = own.clamp_min(1e-300).log()
    count = kept.sum(dim=-1, keepdim=True)
    mean = (log * kept).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    spread = ((log - mean).square() * kept).sum(dim=-1, keepdim=True) / (count - 1).clamp_min(1)
    excess = spread - float(torch.special.polygamma(1, torch.tensor(dof / 2.0, dtype=torch.double)))
    return torch.where(excess > 0, 2 * inverse_trigamma(excess.clamp_min(1e-8)), torch.inf)


def inverse_trigamma(y: Float[Tensor, '...']) -> Float[Tensor, '...']:
    """x with trigamma(x) = y, by Newton's method on 1 / trigamma, which is nearly straight."""
    y = y.double()
    x = 0.5 + 1.0 / y
    for _ in range(50):
        value, slope = torch.special.polygamma(1, x), torch.special.polygamma(2, x)
        x = (x + value * (1 - value / y) / slope).clamp_min(1e-8)
    return x


# ---------------------------------------------------------------- tests


def holm(p: Float[Tensor, '... k']) -> Float[Tensor, '... k']:
    """Probabilities corrected for the number of arms, step down (Holm 1979)."""
    arms = p.shape[-1]
    order = p.argsort(dim=-1)
    scaled = p.gather(-1, order) * torch.arange(arms, 0, -1, dtype=p.dtype)
    return torch.empty_like(p).scatter(-1, order, scaled.cummax(dim=-1).values.clamp_max(1.0))


def two_sided(differences: Float[Tensor, 'f k n'], floor: float = 0.0) -> tuple[Float[Tensor, 'f k'], Moderated]:
    """(p of the moderated t test of each arm, its variances)."""
    found = moderated_variances(differences, floor)
    mean = differences.mean(dim=-1)
    error = (found.variance / differences.shape[-1]).sqrt()
    t = torch.where(error > 0, mean.abs() / error.clamp_min(1e-300), torch.where(mean == 0, 0.0, torch.inf))
    p = torch.as_tensor(2 * scipy_stats().t.sf(t.numpy(), found.dof.numpy()), dtype=mean.dtype)
    return p, found


def paired_t(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """(mean, low, high, p) of the ordinary paired t test with a 95 % interval."""
    values = torch.tensor(differences, dtype=torch.double)
    mean, error, dof = float(values.mean()), float(values.std() / math.sqrt(len(values))), len(values) - 1
    half = t_quantile(1 - LEVEL / 2, dof) * error
    p = 2 * t_sf(abs(mean) / error, dof) if error > 0 else float(mean == 0)
    return mean, mean - half, mean + half, p


def mean_interval(values: Sequence[float], metric_range: tuple[float, float]) -> tuple[float, float]:
    """The 95 % t interval of a mean of at least two values, cut at the lowest and highest possible value."""
    _, low, high, _ = paired_t(values)
    return max(low, metric_range[0]), min(high, metric_range[1])


def equivalence_p(mean: float, error: float, dof: float, margin: float) -> float:
    """p of two one-sided tests: small where the difference lies inside ± ``margin``."""
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return max(t_sf((mean + margin) / error, dof), t_sf((margin - mean) / error, dof))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the exact test that turns the sign of each difference; all 2^n of them, at most 2^16."""
    values = torch.tensor(differences, dtype=torch.double)
    count = len(values)
    if count <= 16:
        signs = 1 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()
    else:
        from x_transformers.evidence.draws import Draws

        signs = 1 - 2 * Draws('sign flip', count).whole(0, 1, 2**16, count).double()
        signs[0] = 1.0
    sums = (signs @ values).abs()
    return float((sums >= values.sum().abs() - 1e-12 * values.abs().sum()).double().mean())


def bca(differences: Sequence[float], rounds: int = 4000) -> tuple[float, float]:
    """The 95 % interval of the mean by the bootstrap, bias-corrected and accelerated (Efron 1987)."""
    from x_transformers.evidence.draws import Draws

    normal = scipy_stats().norm
    values = torch.tensor(differences, dtype=torch.double)
    count, mean = len(values), values.mean()
    if float(values.std()) == 0:
        return float(mean), float(mean)
    means = values[Draws('bca', count, rounds).whole(0, count - 1, rounds, count)].mean(dim=-1).sort().values
    below = ((means < mean).double().mean() + 0.5 * (means == mean).double().mean()).clamp(1 / rounds, 1 - 1 / rounds)
    bias = float(normal.ppf(float(below)))
    without = (values.sum() - values) / (count - 1)
    away = without.mean() - without
    acceleration = float(away.pow(3).sum() / (6 * away.square().sum().pow(1.5)))
    ends = []
    for q in (LEVEL / 2, 1 - LEVEL / 2):
        z = bias + float(normal.ppf(q))
        share = float(normal.cdf(bias + z / (1 - acceleration * z)))
        ends.append(float(torch.quantile(means, share)))
    return ends[0], ends[1]


# ---------------------------------------------------------------- planning


def power_of(difference: float, deviation: float, seeds: int, arms: int = 1) -> float:
    """Probability that ``difference`` is found with ``seeds`` paired seeds, at Holm's strictest step for ``arms``."""
    if deviation == 0:
        return 1.0
    stats, dof = scipy_stats(), seeds - 1
    limit = t_quantile(1 - VERDICT / (2 * arms), dof)
    shift = abs(difference) / deviation * math.sqrt(seeds)
    power = float(stats.nct.sf(limit, dof, shift)) + float(stats.nct.cdf(-limit, dof, shift))
    return 1.0 if math.isnan(power) else power


def smallest(found: Callable[[int], bool], most: int = 10_000) -> int | None:
    """The smallest number of seeds, from 2 on, for which something holds that holds for all larger ones too."""
    low, high = 1, 2
    while not found(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def seeds_for(difference: float, deviation: float, *, arms: int = 1, power: float = 0.8) -> int | None:
    """Seeds that find ``difference`` with probability ``power``; None: more than 10,000."""
    if difference == 0:
        return None
    return smallest(lambda seeds: power_of(difference, deviation, seeds, arms) >= power)


def seeds_to_settle(mean: float, deviation: float, margin: float, arms: int = 1) -> int | None:
    """Seeds after which a difference like ``mean`` would be told from zero, or shown to lie inside ± ``margin``."""

    def inside(seeds: int) -> bool:
        error = deviation / math.sqrt(seeds)
        return equivalence_p(mean, error, seeds - 1, margin) < LEVEL

    differs = seeds_for(mean, deviation, arms=arms)
    equal = smallest(inside) if abs(mean) < margin else None
    found = [seeds for seeds in (differs, equal) if seeds is not None]
    return min(found) if found else None


# ---------------------------------------------------------------- the family


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline, in units of the metric; positive differences are better."""

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    seeds: int
    deviation: float
    dof: float
    outlying: bool
    verdict: Verdict
    smaller_than_margin: bool
    identical: bool
    needs: int | None
    p_equivalent: float
    p_sign: float | None
    bca: tuple[float, float] | None
    pairing_removed: float | None
    """Share of the variance of a difference that pairing removed; negative where pairing added some."""


def margin_of(baseline: Sequence[float], *, accuracy: bool) -> float:
    """The equivalence margin, below which a difference is too small to matter.

    2 sigma of the baseline, at least half a point of accuracy or half a percent of the loss.
    """
    values = torch.tensor(baseline, dtype=torch.double)
    sigma = float(values.std()) if len(values) > 1 else 0.0
    return max(2 * sigma, 0.005 if accuracy else 0.005 * abs(float(values.mean())))


def compare(
    baseline: Sequence[float],
    arms: Sequence[Sequence[float]],
    *,
    better: Literal['higher', 'lower'] = 'higher',
    margin: float,
    resolution: float = 0.0,
    largest: float = math.inf,
    identical: Sequence[bool] | None = None,
) -> list[Comparison]:
    """The verdict of each arm of one task. ``baseline`` and ``arms`` hold one value per seed, in the same order of seeds.

    ``largest``: the largest difference that is possible, 1 for accuracies. Intervals end there.

    With a single seed there are no intervals, and nothing is resolved but what is identical.
    """
    sign = 1.0 if better == 'higher' else -1.0
    base = torch.tensor(baseline, dtype=torch.double)
    values = torch.tensor([list(arm) for arm in arms], dtype=torch.double)
    differences = sign * (values - base)
    same = list(identical or [False] * len(arms))
    count, seeds = differences.shape
    if seeds < 2:
        return [unresolved(float(d[0]), is_same) for d, is_same in zip(differences, same, strict=True)]
    # an arm that is the baseline tells nothing of the variance of the others, and takes no part in the correction
    different = [k for k in range(count) if not same[k]]
    p, variances, dofs = torch.ones(count).double(), torch.zeros(count).double(), torch.full((count,), seeds - 1.0).double()
    p_holm, outlying = torch.ones_like(p), torch.zeros(count, dtype=torch.bool)
    if different:
        # values of an accuracy are rounded to whole answers: their difference has at least the variance of that rounding
        # and what lies below the rounding of 32-bit sums is no difference that could be measured
        floor = max(resolution**2 / 6, (ROUNDING * float(base.abs().mean())) ** 2)
        found_p, found = two_sided(differences[None, different], floor=floor)
        p[different], variances[different], dofs[different] = found_p[0], found.variance[0], found.dof[0]
        p_holm[different], outlying[different] = holm(found_p)[0], found.outlying[0]
    result = []
    for k in range(count):
        mean, variance, dof = float(differences[k].mean()), float(variances[k]), float(dofs[k])
        error = math.sqrt(variance / seeds)
        half = t_quantile(1 - LEVEL / 2, dof) * error
        inside = equivalence_p(mean, error, dof, margin)
        significant = float(p_holm[k]) < VERDICT and not same[k]
        verdict: Verdict = 'not resolved'
        if same[k]:
            verdict = 'no difference'
        elif significant:
            verdict = 'helps' if mean > 0 else 'hurts'
        elif inside < LEVEL:
            verdict = 'no difference'
        listed = differences[k].tolist()
        apart = float(values[k].var() + base.var())
        result.append(
            Comparison(
                mean=mean,
                low=max(mean - half, -largest),
                high=min(mean + half, largest),
                p=float(p[k]),
                p_holm=float(p_holm[k]),
                seeds=seeds,
                deviation=math.sqrt(variance),
                dof=dof,
                outlying=bool(outlying[k]),
                verdict=verdict,
                smaller_than_margin=significant and abs(mean) < margin,
                identical=same[k],
                needs=seeds_to_settle(mean, math.sqrt(variance), margin, len(different)) if verdict == 'not resolved' else None,
                p_equivalent=inside,
                p_sign=sign_flip(listed) if seeds >= 6 else None,
                bca=bca(listed) if seeds >= 20 else None,
                pairing_removed=1 - float(differences[k].var()) / apart if apart > 0 else None,
            )
        )
    return result


def unresolved(mean: float, identical: bool) -> Comparison:
    nan = math.nan
    verdict: Verdict = 'no difference' if identical else 'not resolved'
    return Comparison(
        mean, nan, nan, nan, nan, 1, nan, 0.0, False, verdict, False, identical, None, nan, None, None, None
    )  # fmt: skip
