"""How many more seeds or test rows would let a run find a difference of a given size (see docs/statistics.md)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import special

from workflow.comparison.inference import Difference, Reference, level_of

MOST_SEEDS, MOST_ROWS_FACTOR = 20, 50  # what is beyond these is called out of reach


@dataclass(frozen=True)
class MoreData:
    """What would make a difference of `target` likely to be found. Each way stands alone; None is out of reach.

    Attributes:
        target: in the metric's unit, above zero.
        detectable: what the run can find as it is, in the same unit.
        seeds: in all, on the same test rows.
        items: test items in all, with the same seeds.
    """

    target: float
    detectable: float
    seeds: int | None
    items: int | None


def more_data(difference: Difference, target: float, *, power: float) -> MoreData:
    """Find the fewest seeds, and the fewest test items, with which `target` would be detected with probability `power`.

    The variance over seeds falls with their number and the rest with that of the groups of items, as in the run's
    own standard error; the quantile follows the degrees of freedom that so many would have.

    Args:
        difference: between arms that were trained; its `seed_share` splits its variance.
        target: the true difference that is to be detected, above zero.
    """
    seeds, level = difference.seeds or 1, level_of(difference)

    def with_seeds(number: int) -> float:
        return _detectable(difference, seeds=number, growth=1.0, power=power, level=level)

    # A single seed measured no variance over seeds, so nothing can be said of more of them.
    more_seeds = (
        _least(with_seeds, seeds + 1, MOST_SEEDS, target) if difference.seed_variance_measured else None
    )
    items = items_to_detect(difference, target, power=power, level=level, most_factor=MOST_ROWS_FACTOR)
    return MoreData(target, difference.detectable, more_seeds, items)


def items_to_detect(
    difference: Difference, target: float, *, power: float, level: float, most_factor: int
) -> int | None:
    """Find the fewest items in all, with the same seeds, with which `target` would be detected by a test at a level.

    Args:
        target: the true difference that is to be detected, above zero.
        most_factor: None is returned if more than so many times the items are needed.
    """

    def with_groups(percent: int) -> float:
        growth = percent / 100
        return _detectable(difference, seeds=difference.seeds or 1, growth=growth, power=power, level=level)

    percent = _least(with_groups, 101, 100 * most_factor, target)
    return None if percent is None else math.ceil(difference.items * percent / 100)


def _least(detectable: Callable[[int], float], low: int, high: int, target: float) -> int | None:
    """The least whole number from `low` to `high` whose detectable difference is at most the target, or None."""
    if low > high or detectable(high) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(middle) <= target else (middle + 1, high)
    return low


def _detectable(difference: Difference, *, seeds: int, growth: float, power: float, level: float) -> float:
    """The difference that a two-sided test finds in a run with so many seeds, and `growth` times the groups of items."""
    of_seeds = difference.seed_share * (difference.seeds or 1) / seeds
    of_groups = (1 - difference.seed_share) / growth
    variance = difference.standard_error**2 * (of_seeds + of_groups)
    if variance == 0:
        return 0.0
    low, high = (
        min(growth * freedom, growth * difference.groups - 1)
        for freedom in (difference.low_freedom, difference.high_freedom)
    )
    reference = Reference(
        math.sqrt(variance), of_seeds / (of_seeds + of_groups), max(1, seeds - 1), low, high
    )
    probability = 1 - level / 2
    critical = max(reference.quantile(probability, side) for side in ("low", "high"))
    freedom = min(low, high)
    if reference.seed_share:
        freedom = float(special.stdtridf(probability, critical))
    return reference.error * float(special.nctdtrinc(freedom, 1 - power, critical))
