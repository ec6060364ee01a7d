"""Differences whose units are crossed: the same seeds train on each of several draws of the base (see docs/mechanism.md)."""

import math
from dataclasses import dataclass

import numpy as np

from workflow.comparison.inference import Bootstrap, Difference, Reference, difference


@dataclass(frozen=True)
class CrossedDifference:
    """A mean difference over draws, seeds and items, in the metric's unit, with its two-sided interval."""

    value: float
    low: float
    high: float
    confidence: float
    standard_error: float
    p_value: float  # two-sided; the null hypothesis is no difference
    draws: int
    seeds: int
    items: int
    groups: int


def crossed_difference(
    numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray, bootstrap: Bootstrap
) -> CrossedDifference:
    """Estimate a mean difference with draws and seeds as crossed random effects, and items drawn by group.

    With effects of draws a, of seeds b and a rest e, the mean over K draws and S seeds has the variance
    V(a)/K + V(b)/S + V(e)/(KS). The variance of the mean between draws estimates the first and the third term, and that
    between seeds the second and the third. Their sum is used, which counts the third twice and is never too small in
    expectation. The variance over groups, the larger of both estimates, is added. The draws' and seeds' share has a t
    distribution with the fewer degrees of freedom of the two.

    Args:
        numerators: [draws, seeds, items], arm minus arm.
        denominators, groups: [items], as for `difference`.
        bootstrap: settings of the interval and the test.

    Raises:
        CheckError: as for `difference`.
    """
    draws, seeds, _ = numerators.shape
    sides = [difference(numerators.mean(axis=axis), denominators, groups, bootstrap) for axis in (1, 0)]
    between = sum(side.seed_share * side.standard_error**2 for side in sides)
    over_groups = max((1 - side.seed_share) * side.standard_error**2 for side in sides)
    variance = between + over_groups
    reference = Reference(
        error=math.sqrt(variance),
        seed_share=between / variance if variance else 0.0,
        seed_freedom=min((count for count in (draws, seeds) if count > 1), default=1) - 1,
        low_freedom=min(side.low_freedom for side in sides),
        high_freedom=min(side.high_freedom for side in sides),
    )
    return _stated(sides[0], reference, bootstrap, draws=draws, seeds=seeds)


def _stated(
    one: Difference, reference: Reference, bootstrap: Bootstrap, *, draws: int, seeds: int
) -> CrossedDifference:
    """The difference with the interval and the test of a reference distribution."""
    probability, value = (1 + bootstrap.confidence) / 2, one.value
    return CrossedDifference(
        value=value,
        low=value - reference.error * reference.quantile(probability, "low"),
        high=value + reference.error * reference.quantile(probability, "high"),
        confidence=bootstrap.confidence,
        standard_error=reference.error,
        p_value=min(1.0, 2 * reference.tail(abs(value), "low" if value > 0 else "high")),
        draws=draws,
        seeds=seeds,
        items=one.items,
        groups=one.groups,
    )
