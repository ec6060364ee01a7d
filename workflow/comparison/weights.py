"""How unequally the rows of the test split weigh in the primary metric."""

import numpy as np

from workflow import params
from workflow.comparison.model import Arm, RowWeights
from workflow.comparison.results import Results
from workflow.runtime.forms import AS_TRAINED

TOKENS = "nats_per_token"  # the metric whose denominators are the response's tokens


def weigh_rows(results: Results, settings: params.Params) -> RowWeights | None:
    """Describe the weights of the test rows in the primary metric; None if all weigh the same.

    The effective number of rows is Kish's (Survey Sampling, 1965), (sum w)^2 / sum w^2.
    """
    baseline = Arm(settings.experiment.baseline, AS_TRAINED)
    task, metric = settings.comparison.primary.split("/")
    weights = results.table(baseline, task, metric).denominators
    if not np.ptp(weights):
        return None
    max_length = settings.training_of(baseline.variant).max_length
    longer_rows = longer_share = None
    if f"{task}/{TOKENS}" in results.metrics_per_item:
        longer = results.table(baseline, task, TOKENS).denominators > max_length
        longer_rows, longer_share = int(longer.sum()), float(weights[longer].sum() / weights.sum())
    return RowWeights(
        task=task,
        metric=metric,
        rows=len(weights),
        effective_rows=float(weights.sum() ** 2 / (weights**2).sum()),
        largest_share=float(weights.max() / weights.sum()),
        max_length=max_length,
        longer_rows=longer_rows,
        longer_share=longer_share,
    )
