"""Write a comparison as tidy tables, and as the headline numbers for `dvc metrics`."""

from dataclasses import asdict, fields

import pandas as pd

from workflow.comparison.inference import Difference, Equivalence
from workflow.comparison.model import ALL, Comparison, Contrast, Divergence, Part, Share
from workflow.runtime.forms import AS_TRAINED

COUNTS = ("items", "groups", "seed", "seeds", "processes")  # integers with missing values


def headline(comparison: Comparison) -> dict:
    """The headline numbers that `dvc metrics` shows, by variant."""
    task, metric = comparison.primary.split("/")
    key = f"{task}_{metric}"
    metrics: dict[str, dict[str, float | str]] = {variant: {} for variant in comparison.precisions}
    for score in comparison.scores:
        if (score.task, score.metric, score.form, score.subset) == (task, metric, AS_TRAINED, ALL):
            metrics[score.variant][key] = round(score.value, 6)
    for contrast in comparison.contrasts:
        chosen = (contrast.kind, contrast.form, contrast.subset) == ("to_baseline", AS_TRAINED, ALL)
        if chosen and (contrast.task, contrast.metric) == (task, metric):
            values = metrics[contrast.variant]
            values[f"{key}_minus_{comparison.baseline}"] = round(contrast.difference.value, 6)
            values["verdict"] = contrast.verdict
    for share in comparison.shares:
        if (share.measure, share.form) == ("share_of_gain", AS_TRAINED) and share.value is not None:
            metrics[share.variant]["share_of_gain"] = round(share.value, 4)
    for cost in comparison.cost:
        if cost.metric in ("training_speed", "peak_memory"):
            metrics[cost.variant][f"{cost.metric}_{cost.unit.replace(' ', '_').replace('/', '_per_')}"] = (
                cost.value
            )
    return metrics


def tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """The comparison as tidy tables, by the name of their file."""
    return {
        "summary": _summary(comparison),
        "contrasts": _contrasts_table(comparison.contrasts),
        "decomposition": pd.DataFrame(comparison.decomposition, columns=[f.name for f in fields(Part)]),
        "shares": _shares(comparison.shares),
        "divergences": _divergences(comparison.divergences),
    }


def _summary(comparison: Comparison) -> pd.DataFrame:
    """Every score and cost as a tidy table: one row per variant, form, metric, subset and seed.

    If `seed` is empty, the value is the mean over `seeds` seeds. `seeds` is 0 for an untouched base and empty for a cost,
    which is the geometric mean over `processes` processes; its interval and that of its ratio are over these, and empty
    for fewer than three.
    """
    rows = []
    for score in comparison.scores:
        common = asdict(score)
        per_seed = common.pop("per_seed")
        rows.append({**common, "seed": None, "seeds": len(per_seed)})
        rows += [
            {**common, "seed": int(seed), "seeds": 1, "value": value} for seed, value in per_seed.items()
        ]
    for cost in comparison.cost:
        rows.append(
            {
                "variant": cost.variant,
                "form": "training",
                "task": "benchmark",
                "metric": cost.metric,
                "unit": cost.unit,
                "higher_is_better": cost.higher_is_better,
                "split": "train",
                "subset": ALL,
                "value": cost.value,
                "low": cost.mean_low,
                "high": cost.mean_high,
                "confidence": None if cost.mean_low is None else comparison.confidence,
                "processes": cost.processes,
                **{key: getattr(cost, key) for key in ("ratio_to_baseline", "ratio_low", "ratio_high")},
            }
        )
    columns = ("variant", "form", "task", "metric", "unit", "higher_is_better", "split", "subset", "items", "groups",
               "value", "seed", "seeds", "low", "high", "confidence", "processes", "ratio_to_baseline", "ratio_low",
               "ratio_high")  # fmt: skip
    table = pd.DataFrame(rows, columns=list(columns))
    table = table.astype({**dict.fromkeys(COUNTS, "Int64"), "higher_is_better": "boolean"})
    for key in ("device_name", "storage", "compute"):
        table[key] = [comparison.precisions[variant][key] for variant in table["variant"]]
    return table


def _contrasts_table(contrasts: list[Contrast]) -> pd.DataFrame:
    """Every difference: one row per contrast, metric and subset."""
    nested = ("difference", "equivalence", "by_rows")
    own = [column.name for column in fields(Contrast) if column.name not in nested]
    parts = {
        "": [column.name for column in fields(Difference)],
        "by_rows_": ["value", "low", "high", "p_value"],
    }
    parts["equivalence_"] = [column.name for column in fields(Equivalence)]
    rows = []
    for contrast in contrasts:
        row = {name: getattr(contrast, name) for name in own} | asdict(contrast.difference)
        if contrast.by_rows:
            row |= {f"by_rows_{name}": getattr(contrast.by_rows, name) for name in parts["by_rows_"]}
        if contrast.equivalence:
            row |= {f"equivalence_{key}": value for key, value in asdict(contrast.equivalence).items()}
        rows.append(row)
    columns = own + [f"{prefix}{name}" for prefix, names in parts.items() for name in names]
    return pd.DataFrame(rows, columns=columns).astype(
        dict.fromkeys(("seeds", "items", "groups"), "Int64") | {"in_family": "bool"}
    )


def _shares(shares: list[Share]) -> pd.DataFrame:
    """Every share of the baseline's gain or score, with the baseline's own in the columns `divisor`."""
    columns = [column.name for column in fields(Share) if column.name != "divisor"]
    divisor = ("value", "low", "high")
    rows = [
        {name: getattr(share, name) for name in columns}
        | {f"divisor_{name}": getattr(share.divisor, name) for name in divisor}
        for share in shares
    ]
    return pd.DataFrame(rows, columns=columns + [f"divisor_{name}" for name in divisor])


def _divergences(divergences: list[Divergence]) -> pd.DataFrame:
    """Every measure of divergence: one row over the seeds, where `seed` is empty, and one for each seed."""
    columns = [column.name for column in fields(Divergence) if column.name != "per_seed"]
    rows = []
    for divergence in divergences:
        row = {name: getattr(divergence, name) for name in columns}
        rows.append(row | {"seed": None, "seeds": len(divergence.per_seed)})
        rows += [
            row | {"value": value, "low": None, "high": None, "seed": int(seed), "seeds": 1}
            for seed, value in divergence.per_seed.items()
        ]
    table = pd.DataFrame(rows, columns=[*columns, "seed", "seeds"])
    return table.astype({"seed": "Int64", "seeds": "Int64"})
