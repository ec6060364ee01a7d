"""Find the variants whose validation loss rose again before their training ended, and whose last weights were saved."""

import numpy as np
import pandas as pd
from scipy import stats

from workflow import params
from workflow.comparison.model import Rise
from workflow.comparison.results import Results, left_out_of

SMALLEST_RISE = 0.005  # of the best validation loss; a smaller rise would not justify stopping early


def find_rises(results: Results, settings: params.Params) -> list[Rise]:
    """Find the variants whose validation loss ends above its minimum by more than noise.

    A variant that keeps its best weights is none of them, since no verdict on it rests on its last ones. A rise is noise
    if its interval over the seeds includes zero, or if it is smaller than SMALLEST_RISE of the loss.
    """
    losses = {name: _by_seed(runs) for name, runs in results.validation.items()}
    baseline = losses[settings.experiment.baseline].mean(axis=1)
    rises = []
    for name, by_seed in losses.items():
        if settings.training_of(name).keep == "best":
            continue
        mean = by_seed.mean(axis=1)
        best, last = mean.idxmin(), mean.index[-1]
        change = (by_seed.loc[last] - by_seed.loc[best]).to_numpy()
        low = high = None
        if len(change) > 1:
            quantile = stats.t.ppf((1 + settings.comparison.confidence) / 2, len(change) - 1)
            half = float(quantile * change.std(ddof=1) / len(change) ** 0.5)
            low, high = float(change.mean()) - half, float(change.mean()) + half
        if change.mean() < SMALLEST_RISE * mean[best] or (low is not None and low <= 0):
            continue
        # On other validation rows, a loss is not ahead of the baseline's.
        alike = left_out_of(settings, name) == left_out_of(settings, settings.experiment.baseline)
        shared = mean.index.intersection(baseline.index) if alike else []
        ahead = [step for step in shared if step and mean[step] < baseline[step]]
        until = (
            int(ahead[-1]) if ahead and ahead[-1] != last and name != settings.experiment.baseline else None
        )
        rises.append(Rise(name, int(best), int(last), float(mean[best]), float(mean[last]), low, high, until))
    return rises


def _by_seed(runs: list[pd.DataFrame]) -> pd.DataFrame:
    """The validation loss of each seed, a column each, at the steps of the first.

    Seeds that draw rows of their own may take some steps more or fewer: their curves are read, between two scored steps by
    a straight line, at the same part of the training.
    """
    first, last = runs[0]["step"], runs[0]["step"].iloc[-1]
    columns = {
        i: np.interp(first / last, run["step"] / run["step"].iloc[-1], run["validation_loss"])
        for i, run in enumerate(runs)
    }
    return pd.DataFrame(columns, index=pd.Index(first, name="step"))
