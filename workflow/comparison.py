"""Bring the runs' results together: each variant's quality and cost, and its difference to the baseline."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from workflow import params
from workflow.errors import CheckError, UserError
from workflow.files import read_json
from workflow.paths import (
    benchmark_file,
    evaluate_base_folder,
    evaluate_folder,
    train_folder,
)
from workflow.statistics import Difference, mean_over_seeds, paired_difference


@dataclass(frozen=True)
class Quality:
    """One metric of one variant, averaged over its seeds, with its differences."""

    variant: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    split: str
    items: int
    groups: int
    form: str
    value: float
    per_seed: dict[str, float]
    base_value: float  # the untouched base, in the variant's precision
    to_base: Difference
    to_baseline: Difference | None  # None for the baseline itself


@dataclass(frozen=True)
class Cost:
    """One measured cost of one variant, and its ratio to the baseline's."""

    variant: str
    metric: str
    unit: str
    higher_is_better: bool
    definition: str
    value: float
    low: float | None  # quartiles over the steps, where there are steps
    high: float | None
    ratio_to_baseline: float


@dataclass(frozen=True)
class Comparison:
    baseline: str
    seeds: list[int]
    confidence: float
    resamples: int
    precisions: dict[str, dict]
    training: dict[str, list[dict]]
    quality: list[Quality]
    cost: list[Cost]

    def as_dict(self) -> dict:
        return asdict(self)


def compare(asked: params.Params) -> Comparison:
    """Compare the runs that params name, from the files of the stages before.

    Raises:
        UserError: a run's file is missing; the sentence names it.
        CheckError: the variants were not trained on the same rows for the same steps.
    """
    experiment = asked.experiment
    trained = {
        variant: [_result(train_folder(variant, seed)) for seed in experiment.seeds]
        for variant in experiment.variants
    }
    check_same_training(trained, asked)
    benchmarks = {variant: _result(benchmark_file(variant).parent) for variant in experiment.variants}
    return Comparison(
        baseline=experiment.baseline,
        seeds=list(experiment.seeds),
        confidence=asked.comparison.confidence,
        resamples=asked.comparison.resamples,
        precisions={variant: results[0]["precision"] for variant, results in trained.items()},
        training=trained,
        quality=_quality(asked),
        cost=_cost(benchmarks, experiment.baseline),
    )


def check_same_training(trained: dict[str, list[dict]], asked: params.Params) -> None:
    """Variants that share their training params must have seen the same rows in the same steps.

    Raises:
        CheckError: two of them differ; the sentence names both.
    """
    baseline = asked.experiment.baseline
    facts = [(result["steps"], result["rows"], result["tokens_seen"]) for result in trained[baseline]]
    # The params that decide which rows a run sees, in which steps.
    keys = (
        "steps",
        "epochs",
        "batch_rows",
        "micro_batch_rows",
        "length_window",
        "max_length",
        "use_context",
        "loss_on",
    )
    for variant, results in trained.items():
        ours, theirs = asked.training_of(variant), asked.training_of(baseline)
        if any(getattr(ours, key) != getattr(theirs, key) for key in keys):
            continue
        if [(result["steps"], result["rows"], result["tokens_seen"]) for result in results] != facts:
            raise CheckError(f"{variant} and {baseline} were not trained on the same rows for the same steps")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing; `dvc repro` makes it.")
    return path


def _result(folder: Path) -> dict:
    return read_json(_existing(folder / "result.json"))


def _items(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(_existing(folder / "items.parquet"))


def _quality(asked: params.Params) -> list[Quality]:
    experiment = asked.experiment
    runs = {
        variant: [_items(evaluate_folder(variant, seed)) for seed in experiment.seeds]
        for variant in experiment.variants
    }
    quality = []
    for variant in experiment.variants:
        base_folder = evaluate_base_folder(variant)
        base_items = _items(base_folder)
        base_values = {(m["task"], m["metric"]): m["value"] for m in _result(base_folder)["metrics"]}
        results = [_result(evaluate_folder(variant, seed)) for seed in experiment.seeds]
        for metric in results[0]["metrics"]:
            task, name = metric["task"], metric["metric"]
            ours = mean_over_seeds([_select(items, task, name) for items in runs[variant]])
            theirs = mean_over_seeds([_select(items, task, name) for items in runs[experiment.baseline]])
            per_seed = {str(r["seed"]): _value(r, task, name) for r in results}
            quality.append(
                Quality(
                    variant=variant,
                    task=task,
                    metric=name,
                    unit=metric["unit"],
                    higher_is_better=metric["higher_is_better"],
                    split=metric["split"],
                    items=metric["items"],
                    groups=ours["group"].nunique(),
                    form=results[0]["form"],
                    value=sum(per_seed.values()) / len(per_seed),
                    per_seed=per_seed,
                    base_value=base_values[task, name],
                    to_base=_difference(ours, _select(base_items, task, name), asked.comparison),
                    to_baseline=None
                    if variant == experiment.baseline
                    else _difference(ours, theirs, asked.comparison),
                )
            )
    return quality


def _select(items: pd.DataFrame, task: str, metric: str) -> pd.DataFrame:
    rows = items[(items["task"] == task) & (items["metric"] == metric)]
    return rows[["item", "group", "numerator", "denominator"]]


def _value(result: dict, task: str, metric: str) -> float:
    return next(m["value"] for m in result["metrics"] if (m["task"], m["metric"]) == (task, metric))


def _difference(ours: pd.DataFrame, theirs: pd.DataFrame, asked: params.Comparison) -> Difference:
    return paired_difference(
        ours, theirs, confidence=asked.confidence, resamples=asked.resamples, seed=asked.seed
    )


def _cost(benchmarks: dict[str, dict], baseline: str) -> list[Cost]:
    costs = []
    for variant, result in benchmarks.items():
        other = {m["metric"]: m["value"] for m in benchmarks[baseline]["measurements"]}
        for measured in result["measurements"]:
            costs.append(
                Cost(
                    variant=variant,
                    **measured,
                    ratio_to_baseline=measured["value"] / other[measured["metric"]],
                )
            )
    return costs


def headline(comparison: Comparison) -> dict:
    """The few numbers that `dvc metrics` shows, by variant."""
    shown: dict[str, dict[str, float]] = {}
    for quality in comparison.quality:
        key = f"{quality.task}_{quality.metric}"
        shown.setdefault(quality.variant, {})[key] = round(quality.value, 6)
        if quality.to_baseline:
            shown[quality.variant][f"{key}_minus_{comparison.baseline}"] = round(quality.to_baseline.value, 6)
    for cost in comparison.cost:
        if cost.metric in ("training_speed", "peak_memory"):
            shown[cost.variant][f"{cost.metric}_{cost.unit.replace(' ', '_').replace('/', '_per_')}"] = (
                cost.value
            )
    return shown


def summary(comparison: Comparison) -> pd.DataFrame:
    """The comparison as a tidy table: one row per variant, metric and seed (`all` for their mean)."""
    rows = []
    for quality in comparison.quality:
        common = {
            "variant": quality.variant,
            "metric": f"{quality.task}_{quality.metric}",
            "unit": quality.unit,
            "higher_is_better": quality.higher_is_better,
            "form": quality.form,
            "split": quality.split,
            "items": quality.items,
        }
        against = quality.to_baseline
        rows.append(
            {**common, "seed": "all", "value": quality.value, **_interval(against, comparison.baseline)}
        )
        rows += [{**common, "seed": seed, "value": value} for seed, value in quality.per_seed.items()]
        rows.append({**common, "form": "base", "seed": "none", "value": quality.base_value})
    for cost in comparison.cost:
        rows.append(
            {
                "variant": cost.variant,
                "metric": cost.metric,
                "unit": cost.unit,
                "higher_is_better": cost.higher_is_better,
                "form": "training",
                "split": "train",
                "items": None,
                "seed": "none",
                "value": cost.value,
            }
        )
    table = pd.DataFrame(rows)
    for key in ("device_name", "storage", "compute"):
        table[key] = [comparison.precisions[variant][key] for variant in table["variant"]]
    return table


def _interval(difference: Difference | None, baseline: str) -> dict:
    if difference is None:
        return {}
    return {
        "baseline": baseline,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }
