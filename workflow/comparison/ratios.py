"""Ratios of two measured quantities of the same seeds and items, with Fieller's intervals (see docs/statistics.md)."""

import math
from dataclasses import dataclass

import numpy as np

from workflow.comparison.inference import Bootstrap, Difference, difference


@dataclass(frozen=True)
class Ratio:
    """`value` = the dividend over the divisor, with its two-sided interval."""

    value: float
    low: float
    high: float


def ratio(
    dividends: np.ndarray,
    divisors: np.ndarray,
    denominators: np.ndarray,
    groups: np.ndarray,
    bootstrap: Bootstrap,
    *,
    divisor: Difference,
    span: float | None = None,
) -> Ratio | None:
    """Estimate the ratio of two sums over the same seeds and items, with its interval.

    Fieller (1954): the interval holds each ratio r for which the difference "dividend - r divisor" is not significantly
    different from zero. The variance of that difference is a quadratic in r.

    Args:
        dividends, divisors: [seeds, items]; one row for a single seed.
        denominators, groups: [items], as for `difference`.
        bootstrap: settings of the interval.
        divisor: the divisors' difference from zero, which many ratios share.
        span: the largest difference that one item can make, if scores have a fixed range.

    Returns:
        None if the divisor is too uncertain: if its interval includes zero, the ratio's interval has no ends.

    Raises:
        CheckError: as for `difference`.
    """
    if divisor.low <= 0:
        return None
    value = float(np.sum(dividends) / np.sum(divisors))
    here, beyond = (
        difference(dividends - (value + step) * divisors, denominators, groups, bootstrap, span=span)
        for step in (0, 1)
    )
    # q, the quantile of the differences near the estimate, is the wider half over the standard error.
    source = here if here.standard_error > 0 else divisor
    half = max(source.high - source.value, source.value - source.low)
    quantile = half / source.standard_error if source.standard_error > 0 else 0.0
    constant, square = here.standard_error**2, divisor.standard_error**2
    linear = beyond.standard_error**2 - constant - square
    # The ends are value + t where (t divisor)^2 = q^2 (constant + linear t + square t^2).
    leading = divisor.value**2 - quantile**2 * square
    if leading <= 0:
        return None
    middle = quantile**2 * linear / (2 * leading)
    half = math.sqrt(middle**2 + quantile**2 * constant / leading)
    return Ratio(value, value + middle - half, value + middle + half)
