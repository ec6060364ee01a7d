"""Differences between two arms that answered the same items, and how sure one can be of them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from workflow.errors import CheckError


@dataclass(frozen=True)
class Difference:
    """`value` = this arm less the other one, with a confidence interval over the test items."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def paired_difference(
    arm: pd.DataFrame, other: pd.DataFrame, *, confidence: float, resamples: int, seed: int
) -> Difference:
    """The difference of two ratios of sums over the same items, by a paired cluster bootstrap.

    Items that share an instruction are not independent, so whole groups are drawn (the cluster
    bootstrap of Davison and Hinkley, 1997, section 3.8) and the percentile interval is taken.

    Args:
        arm, other: one row per item with `item`, `group`, `numerator` and `denominator`.
        confidence: of the two-sided interval, for example 0.95.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The difference in the metric's unit.

    Raises:
        CheckError: the arms do not hold the same items with the same denominators, or there are
            fewer than two groups to resample.
    """
    paired = arm.merge(other, on="item", how="outer", suffixes=("", "_other"), validate="one_to_one")
    if paired.isna().any(axis=None) or (paired["denominator"] != paired["denominator_other"]).any():
        raise CheckError("the two arms were not scored on the same items")
    paired["difference"] = paired["numerator"] - paired["numerator_other"]
    groups = paired.groupby("group", sort=True)[["difference", "denominator"]].sum()
    sums = (groups["difference"].to_numpy(), groups["denominator"].to_numpy())
    value = float(ratio_of_sums(*sums))
    if len(groups) < 2:
        raise CheckError("an interval needs at least two groups of items")
    interval = stats.bootstrap(
        sums,
        ratio_of_sums,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 4_000_000 // len(groups)),  # bounds the memory of one batch of resamples
    ).confidence_interval
    return Difference(value, float(interval.low), float(interval.high))


def mean_over_seeds(items: list[pd.DataFrame]) -> pd.DataFrame:
    """Average each item's numerator over the seeds of a variant.

    Raises:
        CheckError: the seeds were not scored on the same items.
    """
    stacked = pd.concat(items)
    if not (stacked.groupby("item").size() == len(items)).all():
        raise CheckError("the seeds of a variant were not scored on the same items")
    return stacked.groupby(["item", "group", "denominator"], as_index=False)["numerator"].mean()
