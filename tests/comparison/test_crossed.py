"""Intervals with draws and seeds as crossed units cover what they should, by simulation and by plain formulas."""

import numpy as np
import pytest

from workflow.comparison.crossed import crossed_difference
from workflow.comparison.inference import Bootstrap, difference

BOOTSTRAP = Bootstrap(confidence=0.95, power=0.8, resamples=400, seed=1)
DRAWS, SEEDS, ITEMS = 3, 3, 80
TRUE = 0.05


def drawn(random, *, of_draws: float, of_seeds: float, of_both: float, of_items: float) -> np.ndarray:
    """Differences per draw, seed and item with normal effects of these standard deviations."""
    return (
        TRUE
        + of_draws * random.standard_normal((DRAWS, 1, 1))
        + of_seeds * random.standard_normal((1, SEEDS, 1))
        + of_both * random.standard_normal((DRAWS, SEEDS, 1))
        + of_items * random.standard_normal((1, 1, ITEMS))
        + 0.02 * random.standard_normal((DRAWS, SEEDS, ITEMS))
    )


@pytest.mark.parametrize(
    "effects",
    [
        {"of_draws": 0.02, "of_seeds": 0.02, "of_both": 0.0, "of_items": 0.05},
        {"of_draws": 0.03, "of_seeds": 0.0, "of_both": 0.0, "of_items": 0.01},
        {"of_draws": 0.0, "of_seeds": 0.0, "of_both": 0.02, "of_items": 0.2},
    ],
    ids=["both", "draws", "items"],
)
def test_the_interval_covers_the_true_difference(effects):
    random, covered, seeds_alone = np.random.default_rng(5), 0, 0
    weights, groups = np.ones(ITEMS), np.arange(ITEMS)
    for _ in range(250):
        sample = drawn(random, **effects)
        interval = crossed_difference(sample, weights, groups, BOOTSTRAP)
        covered += interval.low <= TRUE <= interval.high
        one_way = difference(sample.mean(axis=0), weights, groups, BOOTSTRAP)
        seeds_alone += one_way.low <= TRUE <= one_way.high
    # 250 intervals at 95 %: three standard errors below are 0.909. More is allowed, as the rest is counted twice.
    assert covered / 250 >= 0.909
    if effects["of_draws"] > effects["of_items"]:
        assert seeds_alone / 250 < 0.8  # with draws taken for fixed


def test_variances_are_those_of_the_means():
    random = np.random.default_rng(7)
    sample = drawn(random, of_draws=0.5, of_seeds=0.3, of_both=0.1, of_items=0.0)
    many = Bootstrap(confidence=0.95, power=0.8, resamples=20000, seed=1)
    found = crossed_difference(sample, np.ones(ITEMS), np.arange(ITEMS), many)
    ratios = sample.mean(axis=2)
    by_draw, by_seed = ratios.mean(axis=1).var(ddof=1) / DRAWS, ratios.mean(axis=0).var(ddof=1) / SEEDS
    assert found.value == pytest.approx(sample.mean())
    assert found.standard_error**2 == pytest.approx(by_draw + by_seed, rel=0.05)
    half = 4.3027 * found.standard_error  # the t distribution with two degrees of freedom
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.01)
    assert (found.draws, found.seeds, found.items, found.groups) == (DRAWS, SEEDS, ITEMS, ITEMS)


def test_one_draw_and_one_seed_leave_the_items_alone():
    sample = np.random.default_rng(3).normal(TRUE, 0.1, (1, 1, ITEMS))
    found = crossed_difference(sample, np.ones(ITEMS), np.arange(ITEMS), BOOTSTRAP)
    plain = difference(sample[0], np.ones(ITEMS), np.arange(ITEMS), BOOTSTRAP)
    assert (found.low, found.high, found.p_value) == pytest.approx((plain.low, plain.high, plain.p_value))
