"""Differences between two arms that were scored on the same items, and how sure one can be of them.

docs/statistics.md derives the estimators and tests, names their assumptions and gives their simulated coverage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from workflow.runtime.errors import CheckError

Verdict = Literal["equivalent", "worse", "better", "undecided"]

BATCH_WEIGHTS = 2_000_000  # drawn groups held at a time: bounds the memory of a bootstrap over many items


@dataclass(frozen=True)
class Difference:
    """`value` = this arm less the other one, in the metric's unit, and how sure one can be of it."""

    value: float
    low: float  # of the two-sided interval
    high: float
    confidence: float  # of that interval, for example 0.95
    standard_error: float
    degrees_of_freedom: float
    p_value: float  # two-sided, of no difference
    seeds: int | None  # None: nothing was trained on either side, so no seeds could vary
    items: int
    groups: int
    seed_variance_measured: bool  # with two seeds and more
    detectable: float  # the smallest true difference, either way, that would be found with the asked power
    seed_share: float = 0.0  # of the squared standard error: what was measured between seeds
    group_freedom: float = math.inf  # degrees of freedom of the rest of it


class Reference(NamedTuple):
    """What a difference's distance to its true value is held against (see docs/statistics.md)."""

    error: float  # sqrt(V)
    seed_share: float  # h
    seed_freedom: int  # S - 1
    group_freedom: float  # f

    def quantile(self, probability: float) -> float:
        """q, in units of the standard error."""
        over_groups = float(special.stdtrit(self.group_freedom, probability))
        if self.seed_share == 0:
            return over_groups
        over_seeds = float(special.stdtrit(self.seed_freedom, probability))
        return self.seed_share * over_seeds + (1 - self.seed_share) * over_groups

    def upper_tail(self, distance: float) -> float:
        """The probability that the difference comes out at `distance` or more above the true one."""
        if self.error == 0:
            return float(distance <= 0)
        if distance < 0:
            return 1 - self.upper_tail(-distance)
        statistic = distance / self.error
        over_groups = float(special.stdtr(self.group_freedom, -statistic))
        if self.seed_share == 0:
            return over_groups
        over_seeds = float(special.stdtr(self.seed_freedom, -statistic))
        # q lies between its two parts. On the logarithm, as they can be many orders of magnitude apart;
        # and a little outwards, so that rounding cannot put the root outside.
        ends = sorted(math.log(max(tail, 1e-300)) for tail in (over_groups, over_seeds))
        return math.exp(
            optimize.brentq(
                lambda log: statistic + self.quantile(math.exp(log)), ends[0] - 1e-6, ends[1] + 1e-6
            )
        )


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference lies within a margin of zero."""

    margin: float
    p_value: float  # the larger of the two one-sided tests
    low: float  # of the interval at 1 - 2 alpha, which lies within the margin where p < alpha
    high: float


def difference(
    numerators: np.ndarray,
    denominators: np.ndarray,
    groups: np.ndarray,
    *,
    trained: bool = True,
    span: float | None = None,
    confidence: float,
    power: float,
    resamples: int,
    seed: int,
) -> Difference:
    """The difference of two arms with its interval, its test and what could have been found.

    Args:
        numerators: [seeds, items], arm less arm; one row for a single seed or for untouched bases.
        denominators: [items], all positive, and the same for both arms.
        groups: [items], any labels; items with the same label are not independent.
        trained: false for two untouched bases.
        span: the largest difference that one item can make, where scores have a fixed range.
        confidence: of the two-sided interval; the tests' level is the rest to 1.
        power: with which the detectable difference is found.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        CheckError: the arrays are not of the same items, hold a number that is not finite or a
            denominator that is not positive, or there are fewer than two groups.
    """
    numerators, denominators = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    codes, count = _numbered_groups(numerators, denominators, groups)
    seeds, items = numerators.shape
    if seeds > 1 and not trained:
        raise CheckError("arms that were not trained have no seeds, so only one row of differences")
    sums = np.stack([np.bincount(codes, weights=row, minlength=count) for row in numerators])
    sizes = np.bincount(codes, weights=denominators, minlength=count)
    value = float(sums.sum(axis=1).mean() / sizes.sum())
    reference = _reference(sums, sizes, confidence, resamples, np.random.default_rng(seed))
    if span:
        reference = _at_least(reference, 2 * span / (count + 2))
    critical = reference.quantile((1 + confidence) / 2)
    freedom = reference.group_freedom
    if reference.seed_share:
        freedom = float(special.stdtridf((1 + confidence) / 2, critical))
    return Difference(
        value=value,
        low=value - critical * reference.error,
        high=value + critical * reference.error,
        confidence=confidence,
        standard_error=reference.error,
        degrees_of_freedom=freedom,
        p_value=min(1.0, 2 * reference.upper_tail(abs(value))),
        seeds=seeds if trained else None,
        items=items,
        groups=count,
        seed_variance_measured=seeds > 1,
        detectable=reference.error * float(special.nctdtrinc(freedom, 1 - power, critical)),
        seed_share=reference.seed_share,
        group_freedom=reference.group_freedom,
    )


def _numbered_groups(
    numerators: np.ndarray, denominators: np.ndarray, groups: Sequence
) -> tuple[np.ndarray, int]:
    """Each item's group as a number from 0, and how many there are, after a look at what came in."""
    if numerators.ndim != 2 or len(numerators) == 0:
        raise CheckError("differences come with one row per seed and one column per item")
    if denominators.shape != numerators.shape[1:] or len(groups) != numerators.shape[1]:
        raise CheckError("the differences, denominators and groups are not those of the same items")
    if not np.isfinite(numerators).all():
        raise CheckError("a difference between the arms is not a finite number")
    if not (np.isfinite(denominators) & (denominators > 0)).all():
        raise CheckError("an item's denominator is not a positive number")
    codes, labels = pd.factorize(pd.Series(list(groups), dtype=object), use_na_sentinel=False)
    if len(labels) < 2:
        raise CheckError("an interval needs at least two groups of items")
    return codes, len(labels)


def _reference(
    sums: np.ndarray, sizes: np.ndarray, confidence: float, resamples: int, random: np.random.Generator
) -> Reference:
    """The two-level bootstrap: sums [seeds, groups] of differences, sizes [groups] of denominators."""
    seeds, groups = sums.shape
    ratios = sums.sum(axis=1) / sizes.sum()
    drawn, studentised = _drawn(sums, sizes, resamples, random)
    freedom = _group_freedom(studentised, groups, confidence)
    by_group = drawn.mean(axis=1).var(ddof=1) * groups / (groups - 1)
    if seeds == 1:
        return Reference(math.sqrt(by_group), 0.0, 0, freedom)
    excess = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) - 1
    correction = seeds / (seeds - 1)
    by_seed = (excess @ (ratios - ratios.mean()) / seeds).var(ddof=1) * correction
    both = (excess * (drawn - ratios)).mean(axis=1).var(ddof=1) * correction * groups / (groups - 1)
    variance = by_seed + max(by_group - both, 0.0)
    share = float(by_seed / variance) if variance > 0 else 0.0
    return Reference(math.sqrt(variance), share, seeds - 1, freedom)


def _at_least(reference: Reference, error: float) -> Reference:
    """A standard error of no less; what is added belongs to the groups and not to the seeds."""
    if reference.error >= error:
        return reference
    return reference._replace(error=error, seed_share=reference.seed_share * reference.error**2 / error**2)


def _drawn(
    sums: np.ndarray, sizes: np.ndarray, resamples: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Resamples of whole groups.

    Returns:
        [resamples, seeds] ratios of sums, and [resamples] of their mean over the seeds less the
        observed one, in standard errors; NaN where a resample has none, as when it is one group only.
    """
    groups = len(sizes)
    mean = sums.mean(axis=0)
    value = mean.sum() / sizes.sum()
    rest = mean - value * sizes
    columns = np.vstack([sums, sizes, rest**2, rest * sizes, sizes**2]).T
    batch = max(1, BATCH_WEIGHTS // groups)
    ratios, studentised = [], []
    for start in range(0, resamples, batch):
        rows = min(batch, resamples - start)
        # Multinomial weights: numpy's own sampler takes several times as long as counting draws.
        picks = random.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, np.newaxis]
        weights = np.bincount(picks.ravel(), minlength=rows * groups).reshape(rows, groups)
        totals = weights.astype(float) @ columns
        size, rest2, cross, size2 = totals[:, -4:].T
        ratios.append(totals[:, :-4] / size[:, np.newaxis])
        away = ratios[-1].mean(axis=1) - value
        squares = rest2 - 2 * away * cross + away**2 * size2  # sum of (difference - drawn ratio x size)^2
        known = squares > 1e-9 * (rest2 + away**2 * size2)  # less is what rounding leaves of zero
        error = np.sqrt(np.where(known, squares, np.nan) * groups / (groups - 1)) / size
        studentised.append(away / error)
    return np.concatenate(ratios), np.concatenate(studentised)


def _group_freedom(studentised: np.ndarray, groups: int, confidence: float) -> float:
    """Degrees of freedom of the t distribution that leaves out 1 - confidence of the |t*|: at most G - 1.

    And at least two, where G allows it: where single groups make the sum, resamples without
    them would ask for any width.
    """
    known = np.abs(studentised[np.isfinite(studentised)])
    critical = float(np.quantile(known, confidence)) if len(known) else 0.0
    probability, most = (1 + confidence) / 2, groups - 1.0
    if critical <= special.stdtrit(most, probability):
        return most
    return min(most, max(2.0, float(special.stdtridf(probability, critical))))


def equivalence(difference: Difference, *, margin: float) -> Equivalence:
    """Two one-sided tests of -margin < true difference < margin, at the level 1 - confidence.

    The larger p value is that of the nearer margin.
    """
    seeds = difference.seeds or 1
    # Without seeds' share, the one t distribution is all there is.
    freedom = difference.group_freedom if difference.seed_share else difference.degrees_of_freedom
    reference = Reference(difference.standard_error, difference.seed_share, seeds - 1, freedom)
    half = reference.error * reference.quantile(difference.confidence)
    return Equivalence(
        margin=margin,
        p_value=reference.upper_tail(margin - abs(difference.value)),
        low=difference.value - half,
        high=difference.value + half,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values in the order given: p_(k) (m - k + 1), made to rise with k, at most 1 (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def paired_accuracy_test(differences: np.ndarray, groups: np.ndarray, *, resamples: int, seed: int) -> float:
    """Two-sided p value of a sign-flip test over groups, for answers that are right (1) or wrong (0).

    Exact where all groups that differ at all differ by the same number (McNemar's test where that
    is one answer), and where `resamples` suffice for every pattern of signs; otherwise by drawn signs.

    Args:
        differences: [seeds, items], right or wrong under this arm less the other: -1, 0 or 1.
        groups: [items], as for `difference`.
        resamples, seed: of the drawn signs.

    Raises:
        CheckError: as for `difference`.
    """
    differences = np.asarray(differences, dtype=float)
    codes, count = _numbered_groups(differences, np.ones(differences.shape[-1]), groups)
    sums = np.bincount(codes, weights=differences.sum(axis=0), minlength=count)
    sums = sums[sums != 0]  # a group without a difference keeps its sum under either sign
    if len(sums) == 0:
        return 1.0
    if (np.abs(sums) == np.abs(sums[0])).all():
        return float(stats.binomtest(int((sums > 0).sum()), len(sums)).pvalue)
    test = stats.permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BATCH_WEIGHTS // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def level_of(difference: Difference) -> float:
    """Of the tests; rounded, as 1 - 0.95 is a little more than 0.05."""
    return round(1 - difference.confidence, 12)


def verdict(
    difference: Difference, *, p_adjusted: float, p_equivalence: float | None, higher_is_better: bool
) -> Verdict:
    """What the tests say of this arm, at the level 1 - confidence.

    Args:
        p_adjusted: of no difference, corrected if it is one of several tests.
        p_equivalence: of the equivalence tests, corrected likewise; None where there is no margin.
        higher_is_better: of the metric.
    """
    level = level_of(difference)
    if p_equivalence is not None and p_equivalence < level:
        return "equivalent"
    if p_adjusted >= level or difference.value == 0:
        return "undecided"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
