"""Differences between two arms that were scored on the same items, and how sure one can be of them.

**What comes in.** For each training seed s and test item i, arm less arm: `numerators[s, i]` (a loss
in nats, an answer that is right or wrong), with `denominators[i]` (its tokens, or 1). Both arms were
trained with the same seeds and scored on the same items, so the pairing is already done, and a
difference of differences is the same kind of array. Items with one instruction in common are not
independent: they form a group g, and only whole groups are ever drawn.

**The difference** is d = mean over s of R_s, where R_s = sum_i numerators[s, i] / sum_i denominators[i].

**Its standard error.** Seeds and groups are crossed, not nested: every seed is scored on the same
items. d varies with the seeds drawn, with the groups drawn, and with their interaction (a seed can
be lucky on some items only). A two-level bootstrap draws both with replacement, independently of
each other (Owen's pigeonhole bootstrap, 2007; whole groups as in Davison and Hinkley 1997,
section 3.8), and recomputes the ratios of sums, so that long groups weigh what they weigh. With R*_s
the ratio of seed s over the drawn groups and w_s how often s was drawn, each resample splits into

    groups       mean_s R*_s - d                     its variance, x G/(G-1):            B
    seeds        mean_s (w_s - 1) R_s                its variance, x S/(S-1):            A
    interaction  mean_s (w_s - 1) (R*_s - R_s)       its variance, x both corrections:   E

The factors undo the narrowness of bootstraps over few units (Hesterberg 2015). A and B
estimate what seeds and groups do to d, each with the interaction in it once; to add them would count
it twice, so the standard error is sqrt(V) with V = A + max(B - E, 0): nothing is taken off the seeds'
part A, of which least is known, and no part is negative.

**Interval and test.** With S seeds A has only S-1 degrees of freedom, B has at most G-1. Satterthwaite's
(1946) pooled degrees of freedom fail here: when two seeds happen to agree, A is small and its one
degree of freedom is given almost no weight just when it misleads; intervals that should cover 95 %
cover 87 % (two seeds that make 90 % of the variance). A percentile interval is worse: it does not
know that A is uncertain at all. The quantile used is that of Cochran and Cox (1957, section 4.14),

    q(p) = h t_{S-1}(p) + (1-h) t_f(p),   h = A / V   (`seed_share`),

the interval is d -+ q((1 + confidence)/2) sqrt(V), and the p value is the two-sided one that belongs
to it: an interval leaves out zero exactly where p < 1 - confidence. `degrees_of_freedom` are those of
the one t distribution with this quantile.

f (`group_freedom`) is G-1, or less where groups of unequal size and skewed differences make the tails
heavier than that: each resample of the groups is studentised with its own linearised standard error,
and f is such that t_f has the resamples' |t*| for its quantile (the symmetric bootstrap-t, Hall 1988,
put in the form of a t, so that p values far out do not hang on single resamples).

With one seed, or with no training at all (two untouched bases), sqrt(B) and t_f are used; then
everything holds for that seed only, and `seed_variance_measured` is false.

**How well this does**, simulated with 30 to 150 groups, unequal denominators, skewed items, and seeds
that make from none to nine tenths of the variance: 95 % intervals cover 94 to 98.5 % with two seeds,
94.5 to 97.5 % with three and 94.5 to 97 % with five; with one seed 93.5 to 95.5 %, and 92 to 93 % in the
worst case tried (30 groups, exponential differences, denominators from a few to hundreds; nearly all
misses are then on the side of the tail, so that a one-sided test at 5 % errs in up to 9 %).
tests/comparison/test_statistics.py repeats most of this. The price: two seeds say little about the variance
over seeds, and no method can make them say more. Where seeds are all there is (the same arm trained
twice), intervals from two seeds are on average 5 times as wide as if the variance were known (at half
the variance 3.5 times, at a fifth twice), from three twice, from five 1.3 times. At levels far below
5 %, which a correction for many tests asks for, the seeds' part is only roughly right: with two seeds
that make nearly all of the variance, a test at 0.5 % rejects in about 1 %.

**Few items that differ.** Where an item's score is 0 or 1 (or within any fixed range), few may differ between
the arms, and none does not prove that none would: a bootstrap of nothing but zeros has no width. Such scores
come with their `span`, the largest difference that one item can make, and sqrt(V) is taken to be at least
2 span / (G + 2). It is the rule of three (Hanley and Lippman-Hand 1983): where none of G differs, a true
difference of 3 / G is just possible at 5 %, which is 1.8 / G standard errors of a normal. A loss needs none: if
it is the same to the last bit on every item, so are the models.

**Detectable difference.** The smallest true |d| that the two-sided test at 1 - confidence finds with
probability `power`: sqrt(V) times the noncentrality at which a noncentral t with those degrees of
freedom passes the critical value that often. It is as uncertain as V is (with two seeds: very; a
difference that ought to be found in 80 % of studies is then found in 78 %), and it is that of a test of
its own, before any correction for other tests.

**Equivalence.** Two one-sided tests (Schuirmann 1987) of -margin < d < margin at alpha = 1 - confidence,
with the same quantiles; the interval that belongs to them has confidence 1 - 2 alpha.

**Many tests.** `holm` adjusts p values so that any wrong rejection among them has at most probability
alpha (Holm 1979), whatever their dependence.

**Accuracy.** `paired_accuracy_test` asks of right and wrong answers whether these models differ on
items of this kind: under its hypothesis the sign of each group's summed difference is a coin toss
(McNemar's exact test, 1947, where groups count one each). It holds for the seeds at hand: it does not
allow for their variance, so it is no replacement for `difference` where several were trained.

**The verdict** puts equivalence first (a difference can be both certain and too small to matter), then
a difference by its corrected p value, and otherwise says that the data do not decide.

**Assumed:** groups are independent draws from the items one wants to speak of, seeds from all seeds;
there are enough groups (30 and more) for a sum over them to be near normal, and no group so large
that it makes most of the sum.

Cochran and Cox, Experimental Designs, 2nd ed., Wiley 1957. Davison and Hinkley, Bootstrap Methods
and their Application, Cambridge 1997. Hanley and Lippman-Hand, If nothing goes wrong, is everything all
right?, JAMA 249 (1983). Hall, On symmetric bootstrap confidence intervals, J. R.
Statist. Soc. B 50 (1988). Hesterberg, What teachers should know about the bootstrap, The
American Statistician 69 (2015). Holm, A simple sequentially rejective multiple test procedure,
Scand. J. Statist. 6 (1979). McNemar, Psychometrika 12 (1947). Owen, The pigeonhole bootstrap, Ann.
Appl. Stat. 1 (2007). Satterthwaite, Biometrics Bulletin 2 (1946). Schuirmann, J. Pharmacokinet.
Biopharm. 15 (1987).
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

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Reference(NamedTuple):
    """What a difference's distance to its true value is held against (see the module's docstring)."""

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


def _level(difference: Difference) -> float:
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
    level = _level(difference)
    if p_equivalence is not None and p_equivalence < level:
        return "equivalent"
    if p_adjusted >= level or difference.value == 0:
        return "undecided"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


def sentence(
    arm: str,
    other: str,
    difference: Difference,
    *,
    equivalence: Equivalence | None,
    verdict: Verdict,
    p_adjusted: float,
    unit: str,
    higher_is_better: bool,
    corrected: bool,
) -> str:
    """The verdict in one sentence (and a second one where one seed was trained), from the numbers alone.

    Args:
        arm, other: names of the two arms; the difference is the first less the second.
        equivalence: against the margin, if there is one.
        verdict: as `verdict` gave it.
        p_adjusted: of no difference.
        unit: of the difference, in the plural.
        higher_is_better: of the metric.
        corrected: whether the p value was corrected for other tests.

    Raises:
        CheckError: the verdict does not follow from the difference's sign.
    """
    alpha = _level(difference)
    margin = f"{equivalence.margin:g}" if equivalence else None
    ends = (
        (equivalence.low, equivalence.high) if verdict == "equivalent" else (difference.low, difference.high)
    )
    digits = _digits(difference.value, *ends, within=equivalence.margin if verdict == "equivalent" else None)
    tested = f"{'adjusted p' if corrected else 'p'} {_p_text(p_adjusted, alpha)}"
    limit = f"; margin {margin}" if margin else ""
    if verdict == "equivalent":
        low, high = (_number(end, digits) for end in ends)
        text = (
            f"{arm} is equivalent to {other} within {margin} {unit}: the difference is "
            f"{_number(difference.value, digits)} ({_percent(1 - 2 * alpha)} interval {low} to {high})"
        )
    elif verdict == "undecided":
        low, high = (_number(end, digits, signed=True) for end in ends)
        text = (
            f"Whether {arm} differs from {other} is not decided by this much data: the difference is "
            f"{_number(difference.value, digits, signed=True)} {unit} "
            f"({_percent(difference.confidence)} interval {low} to {high}, {tested}{limit})"
        )
        if difference.detectable > 0:
            found = _number(difference.detectable, _digits(difference.detectable, 0, difference.detectable))
            alone = " by a test of its own" if corrected else ""
            chance = f"would have been found with probability {_power(difference)}{alone}"
            text += f"; a difference of {found} {chance}"
    else:
        if (verdict == "better") != ((difference.value > 0) == higher_is_better):
            raise CheckError(f"{arm} is called {verdict} than {other}, which its difference does not say")
        sign = 1 if difference.value > 0 else -1
        low, high = (_number(end, digits) for end in sorted(sign * end for end in ends))
        text = (
            f"{arm} is {verdict} than {other} by {_number(abs(difference.value), digits)} {unit} "
            f"({_percent(difference.confidence)} interval {low} to {high}, {tested}{limit})"
        )
    if difference.seeds == 1:
        return f"{text}. With one training seed, the variance over seeds was not measured."
    return f"{text}."


def weighting_sentence(by_rows: Difference, *, verdict: Verdict) -> str:
    """That a verdict depends on the weighting, with the difference in which every item weighs the same."""
    ends = by_rows.value, by_rows.low, by_rows.high
    value, low, high = (_number(end, _digits(*ends), signed=True) for end in ends)
    return (
        f"It depends on the weighting: by rows, each weighing the same, it is {verdict}, {value} "
        f"({_percent(by_rows.confidence)} interval {low} to {high})."
    )


def _digits(*numbers: float, within: float | None = None) -> int:
    """Decimals that show half the numbers' span with two figures, and more where rounding would mislead.

    A number that is not zero is not shown as zero, nor one inside `within` as on it or outside.
    """
    span = (max(numbers) - min(numbers)) / 2 or max(abs(number) for number in numbers)
    digits = max(0, 1 - math.floor(math.log10(span))) if span > 0 else 0
    # 15 figures are all that a float holds, so a number nearer than that to a limit is on it.
    for more in range(digits, digits + 15):
        shown = [float(_number(number, more)) for number in numbers]
        misled = any(bool(rounded) != bool(number) for rounded, number in zip(shown, numbers, strict=True))
        if within is not None:
            misled |= any(
                abs(rounded) >= within > abs(number) for rounded, number in zip(shown, numbers, strict=True)
            )
        if not misled:
            return more
    return digits


def _number(number: float, digits: int, *, signed: bool = False) -> str:
    """Without a sign on what is shown as zero."""
    return f"{number:{'+' if signed and number else ''}z.{digits}f}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def _p_text(p: float, level: float) -> str:
    """A p value that is on the same side of the level as the number it was made from."""
    if p < 0.001 < level:
        return "< 0.001"
    for digits in range(3, 15):
        if (float(f"{p:.{digits}f}") < level) == (p < level):
            return f"= {p:.{digits}f}"
    return f"= {p!r}"


def _power(difference: Difference) -> str:
    """The power that the detectable difference was computed for, out of its noncentral t distribution."""
    freedom = difference.degrees_of_freedom
    critical = float(special.stdtrit(freedom, (1 + difference.confidence) / 2))
    shift = difference.detectable / difference.standard_error
    return f"{1 - float(special.nctdtr(freedom, shift, critical)):.2g}"
