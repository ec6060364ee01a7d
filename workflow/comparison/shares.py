"""What each arm kept of the baseline's gain, and its scores as shares of the baseline's."""

import numpy as np

from workflow import params
from workflow.comparison.contrasts import bootstrap, span_of
from workflow.comparison.inference import Difference
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
    baseline = Arm(settings.experiment.baseline, AS_TRAINED)
    arms = [arm for arm in results.evaluated if arm.form != BASE and arm != baseline]
    metrics = {
        metric.name: metric
        for forms in results.evaluated.values()
        for metric in forms[0].metrics
        if metric.per_item and metric.higher_is_better is not None
    }
    primary = settings.comparison.primary
    gains = [_gain(results, arm, baseline, metrics[primary], settings) for arm in arms]
    return gains + [
        _score(results, arm, baseline, metric, settings)
        for metric in metrics.values()
        if metric.higher_is_better
        for arm in arms
    ]


def _gain(results: Results, arm: Arm, baseline: Arm, metric: Metric, settings: params.Params) -> Share:
    """The share of the baseline's gain over its own untouched base that an arm has over the same base."""
    sign = 1 if metric.higher_is_better else -1
    base = _numerators(results, Arm(baseline.variant, BASE), metric)
    ours, theirs = (sign * (_numerators(results, each, metric) - base) for each in (arm, baseline))
    return _share(GAIN, results, (arm, baseline), metric, (ours, theirs), settings)


def _score(results: Results, arm: Arm, baseline: Arm, metric: Metric, settings: params.Params) -> Share:
    """An arm's score as a share of the baseline's."""
    both = tuple(_numerators(results, each, metric) for each in (arm, baseline))
    return _share(SCORE, results, (arm, baseline), metric, both, settings)


def _numerators(results: Results, arm: Arm, metric: Metric) -> np.ndarray:
    return results.table(arm, metric.task, metric.metric).numerators


def _share(
    measure: str,
    results: Results,
    arms: tuple[Arm, Arm],
    metric: Metric,
    numerators: tuple[np.ndarray, np.ndarray],
    settings: params.Params,
) -> Share:
    """One share, from the numerators [seeds, items] of an arm and of the baseline."""
    arm, baseline = arms
    table = results.table(arm, metric.task, metric.metric)
    scores = np.concatenate([_numerators(results, each, metric) for each in arms])
    share, divisor = ratio(
        *numerators,
        table.denominators,
        table.items["group"].to_numpy(),
        bootstrap(settings.comparison),
        span=span_of(scores, table.denominators, metric.metric),
    )
    low, high = _possible(measure, share)
    return Share(
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
