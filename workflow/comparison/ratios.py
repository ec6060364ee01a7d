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
    span: float | None = None,
) -> tuple[Ratio | None, Difference]:
    """Estimate the ratio of two sums over the same seeds and items, with its interval.

    Fieller (1954): the interval holds each ratio r for which the difference "dividend - r divisor" is not significantly
    different from zero. Its variance is a quadratic in r, which three differences determine.

    Args:
        dividends, divisors: [seeds, items]; one row for a single seed.
        denominators, groups: [items], as for `difference`.
        bootstrap: settings of the interval.
        span: the largest difference that one item can make, if scores have a fixed range.

    Returns:
        The ratio, or None if the divisor is not clearly above zero: its interval includes zero, so that the ratio has no
        finite interval; and the divisor itself, as a difference from zero.

    Raises:
        CheckError: as for `difference`.
    """
    divisor = difference(divisors, denominators, groups, bootstrap, span=span)
    if divisor.low <= 0:
        return None, divisor
    value = float(np.sum(dividends) / np.sum(divisors))
    below, at, above = (
        difference(dividends - (value + step) * divisors, denominators, groups, bootstrap, span=span)
        for step in (-1, 0, 1)
    )
    # q, the quantile of the differences near the estimate, is the half-width over the standard error.
    source = at if at.standard_error > 0 else divisor
    quantile = (source.high - source.value) / source.standard_error if source.standard_error > 0 else 0.0
    constant, squares = at.standard_error**2, (above.standard_error**2 + below.standard_error**2) / 2
    linear = (above.standard_error**2 - below.standard_error**2) / 2
    # The ends are value + t where (t divisor)^2 = q^2 (constant + linear t + square t^2).
    leading = divisor.value**2 - quantile**2 * (squares - constant)
    if leading <= 0:
        return None, divisor
    middle = quantile**2 * linear / (2 * leading)
    half = math.sqrt(middle**2 + quantile**2 * constant / leading)
    return Ratio(value, value + middle - half, value + middle + half), divisor
