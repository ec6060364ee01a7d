"""Read the files that the stages wrote about the runs, and their scores per arm, seed and item."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workflow import params
from workflow.comparison.model import ALL, HELD_OUT, SEEN, Arm, Score
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_json
from workflow.runtime.paths import benchmark_file, evaluate_base_folder, evaluate_folder, train_folder


@dataclass(frozen=True)
class Table:
    """One arm's scores in one metric: [seeds, items] numerators (one row for a base), and what the items are."""

    numerators: np.ndarray
    denominators: np.ndarray
    items: pd.DataFrame  # leaf, item, category, held_out, group
    seeds: list[int]  # empty for a base


class Results:
    """Every file that the stages wrote about the runs of params."""

    def __init__(self, settings: params.Params):
        experiment = settings.experiment
        runs = [(name, seed) for name in experiment.variants for seed in experiment.seeds]
        self.trained = {
            name: [_result(train_folder(name, seed)) for seed in experiment.seeds]
            for name in experiment.variants
        }
        self.validation = {
            name: [
                pd.read_csv(_existing(train_folder(name, seed) / "validation.csv"))
                for seed in experiment.seeds
            ]
            for name in experiment.variants
        }
        self.benchmarks = {name: _result(benchmark_file(name).parent) for name in experiment.variants}
        folders = [
            *(evaluate_base_folder(name) for name in experiment.variants),
            *(evaluate_folder(*run) for run in runs),
        ]
        self.items = pd.concat(pd.read_parquet(_existing(folder / "items.parquet")) for folder in folders)
        self.evaluated: dict[Arm, list[dict]] = {}
        for folder in folders:
            result = _result(folder)
            for form in result["forms"]:
                arm = Arm(result["variant"], form["form"])
                stage = f"evaluate_base@{arm.variant}"
                if result["seed"] is not None:
                    stage = f"evaluate@{arm.variant}-{result['seed']}"
                about = {"seed": result["seed"], "versions": result["versions"], "stage": stage}
                self.evaluated.setdefault(arm, []).append({**form, **about})
        self._tables = {
            key: frame for key, frame in self.items.groupby(["variant", "form", "task", "metric"], sort=False)
        }

    def table(self, arm: Arm, task: str, metric: str) -> Table:
        """One arm's scores per seed and item.

        Raises:
            CheckError: it has no such scores, or its seeds were not scored on the same items.
        """
        frame = self._tables.get((arm.variant, arm.form, task, metric))
        if frame is None:
            raise CheckError(f"{arm} has no items with {task}/{metric}, which other arms have")
        return table_of(frame, arm)


def table_of(frame: pd.DataFrame, arm: Arm) -> Table:
    """One arm's rows of items.parquet in one metric, by seed and item.

    Raises:
        CheckError: its seeds were not scored on the same items.
    """
    about = ["leaf", "item", "category", "held_out", "group", "denominator"]
    seeds = sorted(frame["seed"].dropna().unique().tolist())
    parts = [frame[frame["seed"] == seed] for seed in seeds] or [frame]
    parts = [part.sort_values(["leaf", "item"], ignore_index=True) for part in parts]
    if any(not part[about].equals(parts[0][about]) for part in parts):
        raise CheckError(f"the seeds of {arm} were not scored on the same items of {frame['task'].iloc[0]}")
    return Table(
        numerators=np.stack([part["numerator"].to_numpy(float) for part in parts]),
        denominators=parts[0]["denominator"].to_numpy(float),
        items=parts[0][about[:-1]],
        seeds=seeds,
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing; `dvc repro` makes it.")
    return path


def _result(folder: Path) -> dict:
    """What a stage recorded, but for what it read, which comparable.check_inputs compares with dvc.lock."""
    result = read_json(_existing(folder / "result.json"))
    result.pop("inputs", None)
    return result


def subsets(items: pd.DataFrame, *, by_category: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The subsets of a task's items: all, each category, and held-out and seen categories where there are."""
    yield ALL, np.ones(len(items), bool)
    if not by_category:
        return
    held_out = items["held_out"].to_numpy(object) == True  # noqa: E712  (None where a task does not say)
    if held_out.any():
        yield HELD_OUT, held_out
        yield SEEN, ~held_out
    categories = items["category"]
    if categories.nunique() > 1:
        for name in sorted(categories.dropna().unique()):
            yield f"category/{name}", (categories == name).to_numpy()


def measure_scores(results: Results) -> list[Score]:
    """Every metric of every arm, over all items and by category."""
    scores = []
    for arm, forms in results.evaluated.items():
        for about in forms[0]["metrics"]:
            common = {
                **{"variant": arm.variant, "form": arm.form},
                **{key: about[key] for key in ("task", "metric", "unit", "higher_is_better", "split")},
            }
            if not about["per_item"]:
                values = {str(form["seed"]): _value(form, about) for form in forms}
                trained = {} if arm.form == "base" else values
                mean = float(np.mean(list(values.values())))
                scores.append(
                    Score(
                        **common, subset=ALL, items=about["items"], groups=None, value=mean, per_seed=trained
                    )
                )
                continue
            table = results.table(arm, about["task"], about["metric"])
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


def _value(form: dict, about: dict) -> float:
    key = (about["task"], about["metric"])
    return next(m["value"] for m in form["metrics"] if (m["task"], m["metric"]) == key)
