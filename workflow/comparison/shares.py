"""What each arm kept of the baseline's gain, and its scores as shares of the baseline's."""

from collections.abc import Iterator

import numpy as np

from workflow import params
from workflow.comparison.contrasts import bootstrap, span_of
from workflow.comparison.inference import Difference, difference
from workflow.comparison.model import ALL, Arm, Share
from workflow.comparison.ratios import Ratio, ratio
from workflow.comparison.results import Metric, Results
from workflow.comparison.sentences import unstated_share_sentence
from workflow.runtime.forms import AS_TRAINED, BASE

GAIN, SCORE = "share_of_gain", "share_of_score"


def measure_shares(results: Results, settings: params.Params) -> list[Share]:
    """Compute the share of the gain of each arm in the primary metric, and of the score where more is better.

    The baseline as trained is left out: its shares are one by definition.
    """
    metrics = {
        metric.name: metric
        for forms in results.evaluated.values()
        for metric in forms[0].metrics
        if metric.per_item and metric.higher_is_better is not None
    }
    scores = [(SCORE, metric) for metric in metrics.values() if metric.higher_is_better]
    return [
        share
        for measure, metric in [(GAIN, metrics[settings.comparison.primary]), *scores]
        for share in _shares(measure, metric, results, settings)
    ]


def _shares(measure: str, metric: Metric, results: Results, settings: params.Params) -> Iterator[Share]:
    """Yield the shares of all arms in one metric; they have the divisor in common."""

    def numerators(arm: Arm) -> np.ndarray:
        return results.table(arm, metric.task, metric.metric).numerators

    baseline = Arm(settings.experiment.baseline, AS_TRAINED)
    table = results.table(baseline, metric.task, metric.metric)
    sign, start = 1, np.zeros_like(table.denominators)
    if measure == GAIN:
        sign, start = (1 if metric.higher_is_better else -1), numerators(Arm(baseline.variant, BASE))
    about = (table.denominators, table.items["group"].to_numpy(), bootstrap(settings.comparison))
    divisors = sign * (table.numerators - start)
    span = span_of(table.numerators, table.denominators, metric.metric)
    divisor = difference(divisors, *about, span=span)
    for arm in results.evaluated:
        if arm.form == BASE or arm == baseline:
            continue
        span = span_of(np.concatenate([numerators(arm), table.numerators]), table.denominators, metric.metric)
        share = ratio(sign * (numerators(arm) - start), divisors, *about, divisor=divisor, span=span)
        low, high = _possible(measure, share)
        yield Share(
            measure=measure,
            variant=arm.variant,
            form=arm.form,
            other=str(baseline),
            task=metric.task,
            metric=metric.metric,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            split=metric.split,
            subset=ALL,
            items=divisor.items,
            groups=divisor.groups,
            seeds=len(table.seeds),
            confidence=settings.comparison.confidence,
            value=share and share.value,
            low=low,
            high=high,
            divisor=divisor,
            reason=None if share else _reason(measure, baseline, divisor, metric),
        )


def _possible(measure: str, share: Ratio | None) -> tuple[float | None, float | None]:
    """The ends of an interval; that of a score, which is never below zero, begins at zero."""
    if share is None:
        return None, None
    return (max(0.0, share.low) if measure == SCORE else share.low), share.high


def _reason(measure: str, baseline: Arm, divisor: Difference, metric: Metric) -> str:
    quantity = "gain" if measure == GAIN else "score"
    return unstated_share_sentence(str(baseline), quantity, divisor, unit=metric.unit)
