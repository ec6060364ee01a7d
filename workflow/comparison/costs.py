"""The measured costs and their ratios to the baseline's, with intervals over processes (see docs/statistics.md)."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from workflow.comparison.model import Cost, Interval
from workflow.comparison.records import BenchmarkRecord

FEWEST_PROCESSES = 3  # of which an interval is taken


def compare_costs(benchmarks: dict[str, BenchmarkRecord], baseline: str, *, confidence: float) -> list[Cost]:
    """List every benchmarked cost with its ratio to the baseline's, and their intervals if enough processes measured."""
    costs = []
    for variant, result in benchmarks.items():
        for measured in result.measurements:
            ours, theirs = (r.values_of(measured.metric) for r in (result, benchmarks[baseline]))
            mean = mean_interval(ours, confidence)
            ratio = None if variant == baseline else ratio_interval(ours, theirs, confidence)
            costs.append(
                Cost(
                    variant=variant,
                    **measured.model_dump(),
                    processes=len(ours),
                    mean_low=mean and mean.low,
                    mean_high=mean and mean.high,
                    ratio_to_baseline=measured.value / benchmarks[baseline].value_of(measured.metric),
                    ratio_low=ratio and ratio.low,
                    ratio_high=ratio and ratio.high,
                )
            )
    return costs


def mean_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """The interval of a geometric mean over independent processes: Student's t on the logarithms, so no end is below zero.

    Returns:
        None for fewer than `FEWEST_PROCESSES` values.
    """
    if len(values) < FEWEST_PROCESSES:
        return None
    logs = np.log(values)
    error = logs.std(ddof=1) / math.sqrt(len(logs))
    return _around(logs.mean(), error, len(logs) - 1, confidence)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Interval | None:
    """The interval of the ratio of two geometric means over independent processes.

    Welch (1947) on the logarithms: the variants may vary differently, and no process belongs to one of the other variant.

    Returns:
        None if there are fewer than `FEWEST_PROCESSES` values of either.
    """
    if min(len(ours), len(theirs)) < FEWEST_PROCESSES:
        return None
    logs = [np.log(ours), np.log(theirs)]
    squares = [values.var(ddof=1) / len(values) for values in logs]
    total = sum(squares)
    degrees = sum(square**2 / (len(values) - 1) for square, values in zip(squares, logs, strict=True))
    freedom = total**2 / degrees if degrees > 0 else 1.0  # of equal values, whose interval has no width
    return _around(logs[0].mean() - logs[1].mean(), math.sqrt(total), freedom, confidence)


def _around(center: float, error: float, freedom: float, confidence: float) -> Interval:
    """The interval of a quantity whose logarithm has this estimate and standard error."""
    half = special.stdtrit(freedom, (1 + confidence) / 2) * error
    return Interval(math.exp(center - half), math.exp(center + half))
