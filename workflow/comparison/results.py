"""Read the stages' results of the runs, and their scores per arm, seed and item."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from workflow import params
from workflow.comparison.model import ALL, HELD_OUT, SEEN, Arm, Score
from workflow.comparison.records import BenchmarkRecord, FormRecord, GridRecord, TrainingRecord, read_record
from workflow.runtime.errors import CheckError, missing
from workflow.runtime.files import read_json
from workflow.runtime.forms import BASE
from workflow.runtime.paths import (
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    grid_file,
    train_folder,
)


@dataclass(frozen=True)
class Metric:
    """One metric of an evaluated form, as result.json has it."""

    task: str
    metric: str
    value: float  # over all items
    unit: str
    higher_is_better: bool | None  # None if neither direction is better
    split: str | None
    items: int
    per_item: bool  # whether the value is a ratio of sums over items

    @property
    def name(self) -> str:
        """The metric's name in params."""
        return f"{self.task}/{self.metric}"


METRICS = TypeAdapter(list[Metric])
SHARED = ("task", "metric", "unit", "higher_is_better", "split")  # the fields of a Metric that a Score has


@dataclass(frozen=True)
class EvaluatedForm:
    """One serving form of one run.

    Attributes:
        seed: of the training; None for an untouched base.
        stage: the stage that evaluated it.
        metrics: in the order of the tasks.
        record: its entry in result.json, with the library versions of the evaluation.
    """

    seed: int | None
    stage: str
    metrics: list[Metric]
    record: FormRecord


@dataclass(frozen=True)
class Table:
    """One arm's scores in one metric, and the items' descriptions."""

    numerators: np.ndarray  # [seeds, items]; one row for a base
    denominators: np.ndarray  # [items]
    items: pd.DataFrame  # leaf, item, category, held_out, group
    seeds: list[int]  # empty for a base


@dataclass(frozen=True)
class ComparedRun:
    """One run's predictions compared with those of the baseline's run of its seed.

    Attributes:
        stage: the stage that compared them.
        record: its result.json.
        tokens: a row for each form and token, with the columns form, item, group, divergence and same_top.
    """

    variant: str
    seed: int
    stage: str
    record: dict
    tokens: pd.DataFrame


class Results:
    """The results that the stages wrote for the runs in params."""

    def __init__(self, settings: params.Params):
        experiment = settings.experiment
        runs = [(name, seed) for name in experiment.variants for seed in experiment.seeds]
        self.trained = {
            name: [
                read_record(train_folder(name, seed) / "result.json", TrainingRecord)
                for seed in experiment.seeds
            ]
            for name in experiment.variants
        }
        self.validation = {
            name: [
                pd.read_csv(_existing(train_folder(name, seed) / "validation.csv"))
                for seed in experiment.seeds
            ]
            for name in experiment.variants
        }
        measured = settings.benchmark.variants
        self.benchmarks = {name: read_record(benchmark_file(name), BenchmarkRecord) for name in measured}
        self.grids = {
            (name, shape): read_record(grid_file(name, shape), GridRecord)
            for shape in settings.benchmark.grid.named_shapes
            for name in measured
        }
        folders = [
            *(evaluate_base_folder(name) for name in experiment.variants),
            *(evaluate_folder(*run) for run in runs),
        ]
        self.items = with_left_out(
            pd.concat(pd.read_parquet(_existing(folder / "items.parquet")) for folder in folders),
            {name: left_out_of(settings, name) for name in experiment.variants},
        )
        self.evaluated: dict[Arm, list[EvaluatedForm]] = {}
        for folder in folders:
            result = _result(folder)
            for form in result["forms"]:
                arm = Arm(result["variant"], form["form"])
                stage = f"evaluate_base@{arm.variant}"
                if result["seed"] is not None:
                    stage = f"evaluate@{arm.variant}-{result['seed']}"
                record = FormRecord.model_validate({**form, "versions": result["versions"]})
                metrics = METRICS.validate_python(form["metrics"])
                self.evaluated.setdefault(arm, []).append(
                    EvaluatedForm(result["seed"], stage, metrics, record)
                )
        compared = settings.evaluation.divergence_items is not None
        self.divergences = _divergences(runs, experiment.baseline) if compared else []
        self._tables = {
            key: frame for key, frame in self.items.groupby(["variant", "form", "task", "metric"], sort=False)
        }
        self._arranged: dict[tuple[str, str, str, str], Table] = {}

    @property
    def metrics_per_item(self) -> set[str]:
        """Names of the metrics that have a value per item."""
        return {f"{task}/{metric}" for _, _, task, metric in self._tables}

    def table(self, arm: Arm, task: str, metric: str) -> Table:
        """Return one arm's scores per seed and item.

        Raises:
            CheckError: the arm has no such scores, or its seeds were not scored on the same items.
        """
        key = (arm.variant, arm.form, task, metric)
        if key not in self._tables:
            raise CheckError(f"{arm} has no items with {task}/{metric}, which other arms have")
        if key not in self._arranged:  # many differences share an arm
            self._arranged[key] = table_of(self._tables[key], arm)
        return self._arranged[key]


def _divergences(runs: list[tuple[str, int]], baseline: str) -> list[ComparedRun]:
    """Read what stage divergence wrote for each run."""
    return [
        ComparedRun(
            variant=name,
            seed=seed,
            stage=f"divergence@{name}-{baseline}-{seed}",
            record=_result(divergence_folder(name, seed)),
            tokens=pd.read_parquet(_existing(divergence_folder(name, seed) / "tokens.parquet")),
        )
        for name, seed in runs
    ]


def left_out_of(settings: params.Params, variant: str) -> set[str]:
    """The categories that a variant alone leaves out of its training and validation rows."""
    return set(settings.training_of(variant).left_out_categories)


def with_left_out(items: pd.DataFrame, left_out: dict[str, set[str]]) -> pd.DataFrame:
    """The items, of which `held_out` is also true where a variant left out the item's category.

    Args:
        items: with the columns variant, category and held_out, which is None where a task is not of the test split.
        left_out: by variant, the categories.
    """
    if not any(left_out.values()):
        return items
    held_out = items["held_out"].to_numpy(object, copy=True)
    for name, categories in left_out.items():
        own = (items["variant"] == name) & items["category"].isin(categories) & items["held_out"].notna()
        held_out[own.to_numpy()] = True
    return items.assign(held_out=held_out)


def table_of(frame: pd.DataFrame, arm: Arm) -> Table:
    """Arrange one arm's rows of items.parquet in one metric by seed and item.

    Raises:
        CheckError: its seeds were not scored on the same items.
    """
    columns = ["leaf", "item", "category", "held_out", "group", "denominator"]
    seeds = sorted(frame["seed"].dropna().unique().tolist())
    parts = [frame[frame["seed"] == seed] for seed in seeds] or [frame]
    parts = [part.sort_values(["leaf", "item"], ignore_index=True) for part in parts]
    if any(not part[columns].equals(parts[0][columns]) for part in parts):
        raise CheckError(f"the seeds of {arm} were not scored on the same items of {frame['task'].iloc[0]}")
    return Table(
        numerators=np.stack([part["numerator"].to_numpy(float) for part in parts]),
        denominators=parts[0]["denominator"].to_numpy(float),
        items=parts[0][columns[:-1]],
        seeds=seeds,
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise missing(path)
    return path


def _result(folder: Path) -> dict:
    """Read a stage's result.json without its inputs, which comparable.check_inputs compares with dvc.lock."""
    result = read_json(_existing(folder / "result.json"))
    result.pop("inputs", None)
    return result


def subsets(
    items: pd.DataFrame, *, by_category: bool, by_held_out: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the subsets of a task's items: all, held-out and seen categories if there are any, and each category.

    Args:
        by_held_out: whether held-out and seen categories may be among them, if `by_category`.
    """
    yield ALL, np.ones(len(items), bool)
    if not by_category:
        return
    held_out = items["held_out"].to_numpy(object) == True  # noqa: E712  (None where a task does not say)
    if held_out.any() and by_held_out:
        yield HELD_OUT, held_out
        yield SEEN, ~held_out
    categories = items["category"]
    if categories.nunique() > 1:
        for name in sorted(categories.dropna().unique()):
            yield f"category/{name}", (categories == name).to_numpy()


def measure_scores(results: Results) -> list[Score]:
    """Compute every metric of every arm, over all items and by category."""
    scores = []
    for arm, forms in results.evaluated.items():
        for metric in forms[0].metrics:
            common = {
                **{"variant": arm.variant, "form": arm.form},
                **{key: getattr(metric, key) for key in SHARED},
            }
            if not metric.per_item:
                values = {str(form.seed): _value(form, metric) for form in forms}
                trained = {} if arm.form == BASE else values
                mean = float(np.mean(list(values.values())))
                scores.append(
                    Score(**common, subset=ALL, items=metric.items, groups=None, value=mean, per_seed=trained)
                )
                continue
            table = results.table(arm, metric.task, metric.metric)
            for subset, chosen in subsets(table.items, by_category=True):
                sums = table.numerators[:, chosen].sum(axis=1) / table.denominators[chosen].sum()
                scores.append(
                    Score(
                        **common,
                        subset=subset,
                        items=int(chosen.sum()),
                        groups=table.items["group"][chosen].nunique(),
                        value=float(sums.mean()),
                        per_seed={str(s): float(v) for s, v in zip(table.seeds, sums, strict=False)},
                    )
                )
    return scores


def _value(form: EvaluatedForm, metric: Metric) -> float:
    return next(other.value for other in form.metrics if other.name == metric.name)
