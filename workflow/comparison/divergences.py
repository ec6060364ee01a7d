"""How far the predictions of each arm lie from those of the baseline's run of the same seed."""

import numpy as np
import pandas as pd

from workflow import params
from workflow.comparison.contrasts import bootstrap
from workflow.comparison.inference import difference
from workflow.comparison.model import Arm, Divergence
from workflow.comparison.results import ComparedRun, Results
from workflow.runtime.errors import CheckError
from workflow.runtime.forms import AS_TRAINED

KL_MEAN, SAME_TOP = "kl_mean", "same_top_token"
QUANTILES = {"kl_median": 0.5, "kl_p99_9": 0.999}
NATS, SHARE = "nats per token", "share of tokens"


def measure_divergences(results: Results, settings: params.Params) -> list[Divergence]:
    """Compute each measure of each arm that was compared, with the interval of a mean over tokens.

    Raises:
        CheckError: two seeds of an arm were not compared on the same tokens, or an arm was not compared in all seeds.
    """
    by_arm: dict[Arm, list[ComparedRun]] = {}
    for run in results.divergences:
        for form in run.record["forms"]:
            by_arm.setdefault(Arm(run.variant, form["form"]), []).append(run)
    return [measure for arm, runs in by_arm.items() for measure in _of_arm(arm, runs, settings)]


def _of_arm(arm: Arm, runs: list[ComparedRun], settings: params.Params) -> list[Divergence]:
    tokens = [run.tokens[run.tokens["form"] == arm.form].reset_index(drop=True) for run in runs]
    first, place = tokens[0], ["leaf", "item", "group", "position"]
    if [run.seed for run in runs] != list(settings.experiment.seeds) or any(
        not table[place].equals(first[place]) for table in tokens
    ):
        raise CheckError(f"the seeds of {arm} were not compared on the same tokens")
    seeds = [str(run.seed) for run in runs]
    groups = first.drop_duplicates(["leaf", "item"])["group"].to_numpy()
    about = {
        **{"variant": arm.variant, "form": arm.form},
        **{"other": str(Arm(settings.experiment.baseline, AS_TRAINED)), "task": runs[0].record["task"]},
        **{"split": runs[0].record["split"], "items": len(groups), "groups": len(set(groups))},
        **{"tokens": len(first), "confidence": settings.comparison.confidence},
    }
    means = [
        _mean(about, tokens, seeds, groups, settings, measure=measure)
        for measure in ((KL_MEAN, "divergence", NATS), (SAME_TOP, "same_top", SHARE))
    ]
    quantiles = []
    for metric, share in QUANTILES.items():
        values = [float(np.quantile(table["divergence"], share)) for table in tokens]
        quantiles.append(
            Divergence(
                **about,
                metric=metric,
                unit=NATS,
                higher_is_better=False,
                value=float(np.mean(values)),
                low=None,
                high=None,
                per_seed=dict(zip(seeds, values, strict=True)),
            )
        )
    return [means[0], *quantiles, means[1]]


def _mean(
    about: dict,
    tokens: list[pd.DataFrame],
    seeds: list[str],
    groups: np.ndarray,
    settings: params.Params,
    *,
    measure: tuple[str, str, str],
) -> Divergence:
    """A mean over tokens, whose interval is that of a difference: the baseline's divergence from itself is zero.

    Args:
        tokens: of each seed.
        groups: of the items, in the order of the tokens.
        measure: its name, its column and its unit.
    """
    metric, column, unit = measure
    sums = [table.groupby(["leaf", "item"], sort=False)[column].agg(["sum", "size"]) for table in tokens]
    higher = metric == SAME_TOP
    estimate = difference(
        np.stack([table["sum"].to_numpy(float) for table in sums]),
        sums[0]["size"].to_numpy(float),
        groups,
        bootstrap(settings.comparison),
        span=1.0 if higher else None,
    )
    return Divergence(
        **about,
        metric=metric,
        unit=unit,
        higher_is_better=higher,
        value=estimate.value,
        low=max(0.0, estimate.low),
        high=min(1.0, estimate.high) if higher else estimate.high,
        per_seed={seed: float(table[column].mean()) for seed, table in zip(seeds, tokens, strict=True)},
    )
