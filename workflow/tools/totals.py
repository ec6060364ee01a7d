"""What the items' scores of a metric have to do with its total.

The harness logs a score for each item and computes the total by a function of the task. A metric can be compared item by item
if one of the few functions here gives the total of every log again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from workflow.runtime.errors import UserError

TOLERANCE = 1e-6  # between the harness' total and that of the items, as a share of the total
SHARES = {
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
    "em",
    "pass@1",
    "mc1",
    "is_greedy",
}


@dataclass(frozen=True)
class Scores:
    """Scores of the same items in several logs; a log's value is its sum of numerators over that of denominators.

    Attributes:
        numerators: [logs, items], in `unit` times the denominator.
        denominators: [items], positive and the same in all logs.
        unit: of a difference.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    unit: str

    @property
    def span(self) -> float | None:
        """The largest difference that one item can make, where every score is a share from 0 to 1."""
        inside = (self.numerators >= 0) & (self.numerators <= self.denominators)
        return 1.0 if inside.all() else None

    @property
    def is_accuracy(self) -> bool:
        """Whether every item is right (1) or wrong (0)."""
        return bool(np.isin(self.numerators, (0, 1)).all() and (self.denominators == 1).all())


@dataclass(frozen=True)
class Function:
    """A way from the items' scores to a total.

    Attributes:
        parts: an item's score as numerator and denominator; None if it is of another kind.
        total: the total, of the sum of numerators over that of denominators.
        unit: of this ratio, given the metric's name.
    """

    parts: Callable[[object], tuple[float, float] | None]
    total: Callable[[float], float]
    unit: Callable[[str], str]


def _number(score: object) -> tuple[float, float] | None:
    return (float(score), 1.0) if isinstance(score, Real) else None


def _numbers(score: object) -> list[float] | None:
    if isinstance(score, list) and score and all(isinstance(part, Real) for part in score):
        return [float(part) for part in score]
    return None


def _mean(score: object) -> tuple[float, float] | None:
    numbers = _numbers(score)
    return numbers and (sum(numbers), float(len(numbers)))


def _weighted(score: object) -> tuple[float, float] | None:
    numbers = _numbers(score)
    return (numbers[0], numbers[1]) if numbers and len(numbers) == 2 and numbers[1] > 0 else None


def _lost(parts: Callable, per: float = 1.0) -> Callable[[object], tuple[float, float] | None]:
    """The same of a log-likelihood, as a loss."""

    def negative(score: object) -> tuple[float, float] | None:
        pair = parts(score)
        return pair and (-pair[0] / per, pair[1])

    return negative


def _same(total: float) -> float:
    return total


def _exp(total: float) -> float:
    return math.exp(min(total, 700.0))  # a larger one is no double


def _plain(metric: str) -> str:
    return "share of items" if metric in SHARES else "in the task's unit"


def _logarithm(metric: str) -> str:
    return f"nats (the logarithm of {metric})"


# The aggregations of lm_eval/api/metrics.py that are functions of one sum: mean, weighted_mean, perplexity,
# weighted_perplexity and bits_per_byte.
FUNCTIONS = (
    Function(_number, _same, _plain),
    Function(_weighted, _same, _plain),
    Function(_mean, _same, _plain),
    Function(_lost(_number), _exp, _logarithm),
    Function(_lost(_weighted), _exp, _logarithm),
    Function(_lost(_weighted, math.log(2)), _same, lambda metric: "bits per byte"),
)


def scores_of(logged: list[tuple[list, float]], metric: str) -> Scores | None:
    """Find the function that gives the total of every log from its items' scores.

    Args:
        logged: for each log, the scores of its items as they were logged, and the harness' total.
        metric: its name.

    Returns:
        None if no function does, or the items weigh differently in the logs.

    Raises:
        UserError: a score is not finite.
    """
    for function in FUNCTIONS:
        pairs = [[function.parts(score) for score in scores] for scores, _ in logged]
        if any(pair is None for row in pairs for pair in row):
            continue
        numbers = np.array(pairs, dtype=float)  # [logs, items, 2]
        if not np.isfinite(numbers).all():
            raise UserError(f"a score of {metric} is not a finite number.")
        numerators, denominators = numbers[..., 0], numbers[0, :, 1]
        if (numbers[..., 1] != denominators).any():
            continue
        totals = numerators.sum(axis=1) / denominators.sum()
        if all(
            math.isclose(function.total(total), reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            for total, (_, reported) in zip(totals, logged, strict=True)
        ):
            return Scores(numerators, denominators, function.unit(metric))
    return None
