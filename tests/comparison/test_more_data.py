"""How many more seeds or rows a run needs: against its own estimator, on scores with more of them."""

import numpy as np
import pytest

from workflow.comparison.inference import Bootstrap, difference
from workflow.comparison.more_data import more_data

BOOTSTRAP = Bootstrap(confidence=0.95, power=0.8, resamples=4000, seed=1)


def scores(seeds: int, items: int, *, of_seeds: float, of_items: float) -> np.ndarray:
    """Differences [seeds, items] whose seed means and item values spread exactly as told."""
    by_seed = np.linspace(-1, 1, seeds) if seeds > 1 else np.zeros(1)
    by_item = np.tile([-1.0, 1.0], items // 2)
    by_seed = of_seeds * by_seed / (by_seed.std(ddof=1) if seeds > 1 else 1)
    return by_seed[:, None] + of_items * by_item[None, :]


def measured(seeds: int, items: int, *, of_seeds: float = 0.02, of_items: float = 0.1):
    rows = scores(seeds, items, of_seeds=of_seeds, of_items=of_items)
    return difference(rows, np.ones(items), np.arange(items), BOOTSTRAP)


def test_as_many_as_it_has_are_enough_for_what_it_can_find():
    found = measured(3, 100)
    need = more_data(found, found.detectable * 1.001, power=0.8)
    assert need.items == 101 and need.seeds == 4  # the least that is more


@pytest.mark.parametrize("factor", [0.8, 0.6])
def test_with_so_many_rows_the_estimator_itself_finds_the_target(factor):
    found = measured(4, 100, of_seeds=0.001)
    need = more_data(found, factor * found.detectable, power=0.8)
    assert need.items == pytest.approx(100 / factor**2, rel=0.1)
    again = measured(4, need.items // 2 * 2, of_seeds=0.001)
    assert again.detectable == pytest.approx(need.target, rel=0.1)


def test_with_so_many_seeds_the_estimator_itself_finds_the_target():
    found = measured(3, 100, of_seeds=0.1, of_items=0.01)
    need = more_data(found, 0.5 * found.detectable, power=0.8)
    again = measured(need.seeds, 100, of_seeds=0.1, of_items=0.01)
    fewer = measured(need.seeds - 1, 100, of_seeds=0.1, of_items=0.01)
    assert again.detectable <= 1.1 * need.target and fewer.detectable > 0.9 * need.target
    assert need.items is None  # rows do not help against the variance over seeds


def test_one_seed_says_nothing_of_more_seeds():
    found = measured(1, 100)
    assert more_data(found, 0.9 * found.detectable, power=0.8).seeds is None
