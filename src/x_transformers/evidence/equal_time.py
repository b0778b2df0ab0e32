"""Comparison at equal processor time: the slower run is evaluated on its curve where the faster one ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def at_equal_time(
    pairs: Sequence[Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]], ratios: Sequence[float], steps: int, *, higher: bool
) -> list[list[float]]:
    """Differences of each arm by seed, where more is better.

    Where the slower run is read off, its learning rate has not fallen to the end yet, so this judges it a little too hard.

    Args:
        pairs: the results of baseline and arm, by arm and seed.
        ratios: the time of a step of each arm, that of the baseline being 1.
        higher: whether more of the metric is better.
    """
    sign, found = 1.0 if higher else -1.0, []
    for results, ratio in zip(pairs, ratios, strict=True):
        found.append(
            [
                sign * (at_step(arm, min(steps, steps / ratio), steps) - at_step(base, min(steps, steps * ratio), steps))
                for base, arm in results
            ]
        )
    return found


def at_step(result: Mapping[str, Any], step: float, steps: int) -> float:
    """The metric after ``step`` steps, read off between two evaluations; near the end that of the end."""
    if step >= steps * 0.98:
        return float(result['value'])
    curve = [(float(point[0]), float(point[1])) for point in result['curve'] if point[1] is not None]
    for (before, low), (after, high) in pairwise(curve):
        if before <= step <= after:
            return low + (high - low) * (step - before) / (after - before)
    return curve[0][1] if step < curve[0][0] else curve[-1][1]
