"""Differences and their intervals: against a second computation, and against simulation."""

import numpy as np
import pandas as pd
import pytest

from workflow.errors import CheckError
from workflow.statistics import mean_over_seeds, paired_difference

ASKED = {"confidence": 0.95, "resamples": 2000, "seed": 1}


def arm(numerators, denominators=None, groups=None) -> pd.DataFrame:
    count = len(numerators)
    return pd.DataFrame(
        {
            "item": range(count),
            "group": [str(g) for g in (range(count) if groups is None else groups)],
            "numerator": np.asarray(numerators, dtype=float),
            "denominator": np.ones(count, dtype=int) if denominators is None else denominators,
        }
    )


def test_the_difference_is_that_of_the_ratios_of_sums():
    a, b = arm([3, 5, 7], [1, 2, 4]), arm([1, 5, 2], [1, 2, 4])
    found = paired_difference(a, b, **ASKED)
    assert found.value == pytest.approx(15 / 7 - 8 / 7)
    assert found.low <= found.value <= found.high


def test_the_interval_is_that_of_a_bootstrap_written_another_way():
    random = np.random.default_rng(5)
    groups = random.integers(0, 30, 90)
    denominators = random.integers(1, 40, 90)
    a, b = (
        arm(random.normal(3, 1, 90), denominators, groups),
        arm(random.normal(2, 1, 90), denominators, groups),
    )
    found = paired_difference(a, b, confidence=0.95, resamples=20_000, seed=1)
    by_group = {g: np.flatnonzero(groups == g) for g in np.unique(groups)}
    names = list(by_group)
    drawn = []
    for _ in range(5000):
        rows = np.concatenate([by_group[names[i]] for i in random.integers(0, len(names), len(names))])
        drawn.append((a.numerator.to_numpy() - b.numerator.to_numpy())[rows].sum() / denominators[rows].sum())
    assert [found.low, found.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_a_constant_shift_is_found_without_uncertainty():
    base = np.random.default_rng(0).normal(3, 1, 50)
    found = paired_difference(arm(base + 0.25), arm(base), **ASKED)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.decided and not paired_difference(arm(base), arm(base), **ASKED).decided


def test_rows_of_one_group_are_not_taken_for_independent():
    random = np.random.default_rng(2)
    effect = random.normal(0, 1, 20)
    groups = np.repeat(np.arange(20), 10)
    clustered = paired_difference(
        arm(effect[groups], groups=groups), arm(np.zeros(200), groups=groups), **ASKED
    )
    as_if_single = paired_difference(arm(effect[groups]), arm(np.zeros(200)), **ASKED)
    assert clustered.high - clustered.low > 2 * (as_if_single.high - as_if_single.low)


def test_intervals_cover_the_truth_and_arms_that_are_alike_are_rarely_told_apart():
    """600 studies of up to 100 groups; a percentile interval over so many covers 94 % in the long run."""
    random = np.random.default_rng(7)
    covered = told_apart = 0
    for study in range(600):
        groups = random.integers(0, 100, 140)
        cluster = random.normal(0, 0.3, 100)[groups]
        base = random.gamma(2, 1.5, 140)
        shifted = base + 0.1 + cluster + random.normal(0, 0.5, 140)
        alike = base + random.normal(0, 0.3, 100)[groups] + random.normal(0, 0.5, 140)
        asked = {"confidence": 0.95, "resamples": 1000, "seed": study}
        found = paired_difference(arm(shifted, groups=groups), arm(base, groups=groups), **asked)
        covered += found.low <= 0.1 <= found.high
        told_apart += paired_difference(arm(alike, groups=groups), arm(base, groups=groups), **asked).decided
    assert covered / 600 == pytest.approx(0.95, abs=0.03)
    assert told_apart / 600 == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize("other", [arm([1, 2]), arm([1, 2, 3], [1, 1, 2])])
def test_arms_with_other_items_are_refused(other):
    with pytest.raises(CheckError, match="not scored on the same items"):
        paired_difference(arm([1, 2, 3]), other, **ASKED)


def test_seeds_are_averaged_item_by_item():
    mean = mean_over_seeds([arm([1, 2, 3]), arm([3, 2, 1])])
    assert mean["numerator"].tolist() == [2, 2, 2]
    with pytest.raises(CheckError, match="seeds of a variant"):
        mean_over_seeds([arm([1, 2, 3]), arm([1, 2])])
