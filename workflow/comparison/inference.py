"""Differences between two arms that were scored on the same items, with their uncertainty and tests.

docs/statistics.md derives the estimators and tests, names their assumptions and gives their simulated coverage.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from workflow.runtime.errors import CheckError

Verdict = Literal["equivalent", "worse", "better", "undecided"]
Side = Literal["low", "high"]  # of an interval

# Beyond these, intervals cover less than their confidence in simulations (docs/statistics.md).
SKEWED = 1.0  # absolute skewness of the groups' contributions
FEW_GROUPS = 30  # effective groups
GUARD = 4  # the tests' level is divided by this in tests of equivalence beyond them

BATCH_WEIGHTS = 2_000_000  # group draws in memory at a time: bounds the memory of a bootstrap over many items


@dataclass(frozen=True)
class Bootstrap:
    """Settings of every difference's interval and tests.

    Attributes:
        confidence: of the two-sided interval, for example 0.95; the tests' level is 1 - confidence.
        power: the probability with which a detectable difference is detected.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """

    confidence: float
    power: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Difference:
    """`value` = this arm minus the other, in the metric's unit, with its uncertainty."""

    value: float
    low: float  # of the two-sided interval
    high: float
    confidence: float  # of that interval, for example 0.95
    standard_error: float
    degrees_of_freedom: float
    p_value: float  # two-sided; the null hypothesis is no difference
    seeds: int | None  # None: neither arm was trained, so there are no seeds
    items: int
    groups: int
    seed_variance_measured: bool  # with two or more seeds
    detectable: (
        float  # the smallest true difference, in either direction, that is detected with the set power
    )
    seed_share: float = 0.0  # share of the squared standard error that is due to seeds
    low_freedom: float = math.inf  # degrees of freedom of the rest, at the interval's low end
    high_freedom: float = math.inf  # and at its high end
    # How unequal the groups are; None in a comparison that is older than these fields.
    effective_groups: float | None = (
        None  # Kish's number, (sum w)^2 / sum w^2 over the groups' denominators w
    )
    largest_weight: float | None = None  # the largest group's share of the denominators
    largest_share: float | None = None  # the largest group's share of the variance over groups
    skewness: float | None = None  # of the groups' contributions: 0 if they are symmetric
    bounded: bool = False  # whether the scores have a fixed range, so that the standard error has a floor


class Reference(NamedTuple):
    """The reference distribution of a difference's distance to its true value (see docs/statistics.md).

    It has two sides, because a skewed sample says more about one end of its interval than about the other.
    """

    error: float  # sqrt(V)
    seed_share: float  # h
    seed_freedom: int  # S - 1
    low_freedom: float  # f of an estimate above the true difference, which the low end rests on
    high_freedom: float  # f of an estimate below it

    def freedom(self, side: Side) -> float:
        """f at one end of the interval."""
        return self.low_freedom if side == "low" else self.high_freedom

    def quantile(self, probability: float, side: Side) -> float:
        """q at one end of the interval, in units of the standard error."""
        over_groups = float(special.stdtrit(self.freedom(side), probability))
        if self.seed_share == 0:
            return over_groups
        over_seeds = float(special.stdtrit(self.seed_freedom, probability))
        return self.seed_share * over_seeds + (1 - self.seed_share) * over_groups

    def tail(self, distance: float, side: Side) -> float:
        """The probability that the estimate is `distance` or more above the true difference (low side) or below it."""
        if self.error == 0:
            return float(distance <= 0)
        if distance < 0:
            return 1 - self.tail(-distance, side)
        statistic = distance / self.error
        over_groups = float(special.stdtr(self.freedom(side), -statistic))
        if self.seed_share == 0:
            return over_groups
        over_seeds = float(special.stdtr(self.seed_freedom, -statistic))
        # q lies between its two parts. The search is over logarithms, because the parts can be many orders of
        # magnitude apart, and its ends are moved outwards, so that rounding cannot exclude the root.
        ends = sorted(math.log(max(tail, 1e-300)) for tail in (over_groups, over_seeds))
        return math.exp(
            optimize.brentq(
                lambda log: statistic + self.quantile(math.exp(log), side), ends[0] - 1e-6, ends[1] + 1e-6
            )
        )


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference lies within a margin of zero."""

    margin: float
    p_value: float  # the larger of the two one-sided tests, times the guard
    low: float  # of the interval at 1 - 2 alpha / guard, which lies within the margin if p < alpha
    high: float
    confidence: float | None = None  # of this interval; None, in older comparisons, for 1 - 2 alpha


@dataclass(frozen=True)
class Judgment:
    """A difference's p values after the correction, and its verdict."""

    p_adjusted: float
    equivalence: Equivalence | None  # None without a margin
    p_equivalence: float | None  # corrected
    verdict: Verdict


def difference(
    numerators: np.ndarray,
    denominators: np.ndarray,
    groups: np.ndarray,
    bootstrap: Bootstrap,
    *,
    trained: bool = True,
    span: float | None = None,
) -> Difference:
    """Estimate the difference between two arms, with its interval, its test and the detectable difference.

    Args:
        numerators: [seeds, items], arm minus arm; one row for a single seed or for untouched bases.
        denominators: [items], all positive, and the same for both arms.
        groups: [items], any labels; items with the same label are not independent.
        bootstrap: settings of the interval and the tests.
        trained: false for two untouched bases.
        span: the largest difference that one item can make, if scores have a fixed range.

    Raises:
        CheckError: the arrays do not describe the same items, contain a number that is not finite or a
            denominator that is not positive, or have fewer than two groups.
    """
    numerators, denominators = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    codes, count = _numbered_groups(numerators, denominators, groups)
    seeds, items = numerators.shape
    if seeds > 1 and not trained:
        raise CheckError("arms that were not trained have no seeds, so only one row of differences")
    sums = np.stack([np.bincount(codes, weights=row, minlength=count) for row in numerators])
    sizes = np.bincount(codes, weights=denominators, minlength=count)
    value = float(sums.sum(axis=1).mean() / sizes.sum())
    reference = _reference(sums, sizes, bootstrap, symmetric=bool(span))
    if span:
        reference = _at_least(reference, 2 * span / (count + 2))
    probability = (1 + bootstrap.confidence) / 2
    low, high = (reference.quantile(probability, side) for side in ("low", "high"))
    critical, freedom = max(low, high), min(reference.low_freedom, reference.high_freedom)
    if reference.seed_share:
        freedom = float(special.stdtridf(probability, critical))
    return Difference(
        value=value,
        low=value - low * reference.error,
        high=value + high * reference.error,
        confidence=bootstrap.confidence,
        standard_error=reference.error,
        degrees_of_freedom=freedom,
        p_value=min(1.0, 2 * reference.tail(abs(value), "low" if value > 0 else "high")),
        seeds=seeds if trained else None,
        items=items,
        groups=count,
        seed_variance_measured=seeds > 1,
        detectable=reference.error * float(special.nctdtrinc(freedom, 1 - bootstrap.power, critical)),
        seed_share=reference.seed_share,
        low_freedom=reference.low_freedom,
        high_freedom=reference.high_freedom,
        **_inequality(sums, sizes),
        bounded=bool(span),
    )


def _inequality(sums: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """How unequal the groups are, as the fields of `Difference` that say so.

    A group's contribution is its part of the linearized difference: its sum, mean over the seeds, less its size times the
    difference (Taylor's linearization of a ratio; Woodruff, J. Am. Stat. Assoc. 66, 1971). Contributions sum to zero.
    The effective number is Kish's (Survey Sampling, 1965).
    """
    mean = sums.mean(axis=0)
    rest = mean - mean.sum() / sizes.sum() * sizes
    squares = rest**2
    varies = squares.sum() > 1e-18 * (mean**2).sum()  # smaller values are rounding errors of zero
    return {
        "effective_groups": float(sizes.sum() ** 2 / (sizes**2).sum()),
        "largest_weight": float(sizes.max() / sizes.sum()),
        "largest_share": float(squares.max() / squares.sum()) if varies else 0.0,
        "skewness": float((rest**3).mean() / squares.mean() ** 1.5) if varies else 0.0,
    }


def _numbered_groups(
    numerators: np.ndarray, denominators: np.ndarray, groups: Sequence
) -> tuple[np.ndarray, int]:
    """Check the arrays, number the groups from 0, and count them."""
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


def _reference(sums: np.ndarray, sizes: np.ndarray, bootstrap: Bootstrap, *, symmetric: bool) -> Reference:
    """Run the two-level bootstrap over sums [seeds, groups] of differences and sizes [groups] of denominators.

    Args:
        symmetric: whether both ends have the same degrees of freedom.
    """
    resamples = bootstrap.resamples
    seeds, groups = sums.shape
    ratios = sums.sum(axis=1) / sizes.sum()
    weights, random = _group_weights(groups, resamples, bootstrap.seed)
    drawn, studentised = _drawn(sums, sizes, weights)
    freedoms = _group_freedoms(studentised, groups, bootstrap.confidence, symmetric=symmetric)
    by_group = drawn.mean(axis=1).var(ddof=1) * groups / (groups - 1)
    if seeds == 1:
        return Reference(math.sqrt(by_group), 0.0, 0, *freedoms)
    excess = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) - 1
    correction = seeds / (seeds - 1)
    by_seed = (excess @ (ratios - ratios.mean()) / seeds).var(ddof=1) * correction
    both = (excess * (drawn - ratios)).mean(axis=1).var(ddof=1) * correction * groups / (groups - 1)
    variance = by_seed + max(by_group - both, 0.0)
    share = float(by_seed / variance) if variance > 0 else 0.0
    return Reference(math.sqrt(variance), share, seeds - 1, *freedoms)


def _at_least(reference: Reference, error: float) -> Reference:
    """Raise the standard error to at least `error`; the addition counts as variance over groups, not seeds."""
    if reference.error >= error:
        return reference
    return reference._replace(error=error, seed_share=reference.seed_share * reference.error**2 / error**2)


@functools.lru_cache(maxsize=16)
def _drawn_groups(groups: int, resamples: int, seed: int) -> tuple[np.ndarray, dict]:
    """How often each resample has each group, [resamples, groups], and the state of the generator after these draws.

    They depend on no score, so differences over as many groups share them: drawing takes longer than all the rest.
    """
    random = np.random.default_rng(seed)
    batch = _batch(groups)
    weights = np.empty((resamples, groups), dtype=np.uint16)
    for start in range(0, resamples, batch):
        rows = min(batch, resamples - start)
        # Multinomial weights: numpy's own sampler takes several times as long as counting draws.
        picks = random.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, np.newaxis]
        counts = np.bincount(picks.ravel(), minlength=rows * groups)
        weights[start : start + rows] = counts.reshape(rows, groups)
    weights.flags.writeable = False
    return weights, random.bit_generator.state


def _group_weights(groups: int, resamples: int, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """The weights of `_drawn_groups`, and a generator that goes on after them."""
    weights, state = _drawn_groups(groups, resamples, seed)
    random = np.random.default_rng()
    random.bit_generator.state = state
    return weights, random


def _batch(groups: int) -> int:
    """Resamples that are computed at a time, which bounds the memory."""
    return max(1, BATCH_WEIGHTS // groups)


def _drawn(sums: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resample whole groups.

    Args:
        weights: [resamples, groups], how often each resample has each group.

    Returns:
        The ratios of sums, [resamples, seeds]; and the distance of their mean over the seeds from the
        observed mean in standard errors, [resamples], which is NaN if a resample has no standard error
        (a single group).
    """
    groups = len(sizes)
    mean = sums.mean(axis=0)
    value = mean.sum() / sizes.sum()
    rest = mean - value * sizes
    columns = np.vstack([sums, sizes, rest**2, rest * sizes, sizes**2]).T
    batch = _batch(groups)
    ratios, studentised = [], []
    for start in range(0, len(weights), batch):
        totals = weights[start : start + batch].astype(float) @ columns
        size, rest2, cross, size2 = totals[:, -4:].T
        ratios.append(totals[:, :-4] / size[:, np.newaxis])
        away = ratios[-1].mean(axis=1) - value
        squares = rest2 - 2 * away * cross + away**2 * size2  # sum of (difference - drawn ratio x size)^2
        known = squares > 1e-9 * (rest2 + away**2 * size2)  # smaller values are rounding errors of zero
        error = np.sqrt(np.where(known, squares, np.nan) * groups / (groups - 1)) / size
        studentised.append(away / error)
    return np.concatenate(ratios), np.concatenate(studentised)


def _group_freedoms(
    studentised: np.ndarray, groups: int, confidence: float, *, symmetric: bool
) -> tuple[float, float]:
    """Degrees of freedom at the low and the high end: those of the t distributions with the quantiles of the t*.

    Each end has the fewer of those that fit |t*| at `confidence` (the symmetric bootstrap-t) and t* on its own side at the
    same level (the equal-tailed one; Hall 1988). The low end rests on large t*, and the high end on small ones. Symmetric ends
    have the first alone: scores with a fixed range, of which few differ, have too few values of t* for one tail.
    """
    known = studentised[np.isfinite(studentised)]
    if not len(known):
        return groups - 1.0, groups - 1.0
    both = _freedom_of(float(np.quantile(np.abs(known), confidence)), groups, (1 + confidence) / 2)
    if symmetric:
        return both, both
    low = _freedom_of(float(np.quantile(known, confidence)), groups, confidence)
    high = _freedom_of(-float(np.quantile(known, 1 - confidence)), groups, confidence)
    return min(both, low), min(both, high)


def _freedom_of(critical: float, groups: int, probability: float) -> float:
    """Degrees of freedom of the t distribution with this quantile, at most G - 1, and at least two if G allows it.

    If single groups make most of the sum, resamples without them would make the interval arbitrarily wide.
    """
    most = groups - 1.0
    if critical <= special.stdtrit(most, probability):
        return most
    return min(most, max(2.0, float(special.stdtridf(probability, critical))))


def equivalence(difference: Difference, *, margin: float) -> Equivalence:
    """Test -margin < true difference < margin by two one-sided tests at the level 1 - confidence.

    The p value is the larger of the two. Where a difference may be covered too rarely, it is multiplied by `GUARD`: a sample
    that lacks the tail of a skewed distribution looks precise, and nearer to zero than the truth.
    """
    reference, value = _reference_of(difference), difference.value
    guard = GUARD if may_cover_too_little(difference) else 1
    tail = max(reference.tail(margin + value, "low"), reference.tail(margin - value, "high"))
    level = level_of(difference) / guard
    return Equivalence(
        margin=margin,
        p_value=min(1.0, guard * tail),
        low=value - reference.error * reference.quantile(1 - level, "low"),
        high=value + reference.error * reference.quantile(1 - level, "high"),
        confidence=1 - 2 * level,
    )


def may_cover_too_little(difference: Difference) -> bool:
    """Whether the groups are so few or so skewed that the interval may cover less than its confidence.

    Scores with a fixed range are exempt: the floor of their standard error keeps their coverage.
    """
    if (
        difference.bounded or difference.skewness is None
    ):  # None: of a comparison that is older than the field
        return False
    return abs(difference.skewness) >= SKEWED or difference.effective_groups < FEW_GROUPS


def _reference_of(difference: Difference) -> Reference:
    """The reference distribution that a difference was estimated with."""
    return Reference(
        difference.standard_error,
        difference.seed_share,
        (difference.seeds or 1) - 1,
        difference.low_freedom,
        difference.high_freedom,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's procedure (1979): p_(k) (m - k + 1), increasing in k, at most 1; in the given order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def paired_accuracy_test(differences: np.ndarray, groups: np.ndarray, *, resamples: int, seed: int) -> float:
    """Two-sided p value of a sign-flip test over groups, for answers that are right (1) or wrong (0).

    The test is exact if all groups that differ at all differ by the same number (McNemar's test if that
    number is one answer), or if `resamples` suffice for every pattern of signs. Otherwise signs are drawn.

    Args:
        differences: [seeds, items], correctness under this arm minus that under the other: -1, 0 or 1.
        groups: [items], as for `difference`.
        resamples: number of draws of signs.
        seed: of the draws.

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
    """The level of the tests, rounded because 1 - 0.95 is a little more than 0.05."""
    return round(1 - difference.confidence, 12)


def verdict(
    difference: Difference, *, p_adjusted: float, p_equivalence: float | None, higher_is_better: bool
) -> Verdict:
    """The verdict on this arm at the level 1 - confidence.

    Args:
        p_adjusted: p value of no difference, corrected if there are several tests.
        p_equivalence: p value of the equivalence tests, corrected in the same way; None without a margin.
        higher_is_better: direction of the metric.
    """
    level = level_of(difference)
    if p_equivalence is not None and p_equivalence < level:
        return "equivalent"
    if p_adjusted >= level or difference.value == 0:
        return "undecided"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
