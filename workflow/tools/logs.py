"""Read the logs that lm-evaluation-harness writes with --log_samples.

A folder holds results_DATE.json with the totals, and beside it samples_TASK_DATE.jsonl with a line for each item and filter
(`EvaluationTracker` in lm_eval/loggers/evaluation_tracker.py, 0.4.3 to 0.4.13). Lines of older versions name neither their
filter nor their metrics; both then follow from the totals.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workflow.runtime.errors import UserError, first_of

DATED = re.compile(r".+_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")
IDENTITY = ["item", "document", "target"]  # an item is the same in two logs if these are
Key = tuple[str, str]  # a metric and the filter that its answers went through


@dataclass(frozen=True)
class TaskLog:
    """What one log holds of one task.

    Attributes:
        items: a row per item in the order of their ids: item (its id), document, prompt and target (digests), and
            cluster (items with the same label are not independent).
        scores: for each metric and filter, the score of each item as it was logged: a number, or a list of what the
            metric's total is made of.
        totals: the harness' own total of each metric and filter.
        higher_is_better: by metric; None where the harness does not say.
    """

    task: str
    version: str
    items: pd.DataFrame
    scores: dict[Key, list]
    totals: dict[Key, float]
    higher_is_better: dict[str, bool | None]


@dataclass(frozen=True)
class Log:
    """One run of the harness, or several runs of one model into one folder.

    Attributes:
        model: its name, as the harness recorded it.
        tasks: by name; a group of tasks (such as mmlu) is pooled under its own name too.
        notes: sentences on what was passed over.
    """

    path: Path
    model: str
    tasks: dict[str, TaskLog]
    notes: list[str]


def read(path: Path, *, tasks: Iterable[str] = (), cluster: str | None = None) -> Log:
    """Read a log.

    Args:
        path: a folder that was the harness' --output_path or lies in it, or one results file. Of a task that ran more than
            once in a folder, the last run counts.
        tasks: to read; all if there are none.
        cluster: the field of a document by which items are clustered; the document itself by default.

    Raises:
        UserError: there is no log, it is of several models, a file is damaged, or a task has no samples.
    """
    files = _results_files(path)
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise UserError(
            f"{path} holds logs of {len(folders)} models: name the folder of one ({first_of(folders)})."
        )
    names, logs, notes, models = set(tasks), {}, [], {}
    for file in files:
        results = _json_of(file)
        models[str(results.get("model_name"))] = None
        here = [task for task in results.get("configs", results["results"]) if not names or task in names]
        groups = {
            group: leaves
            for group, leaves in _leaves_of_groups(results).items()
            if not names or group in names
        }
        for task in dict.fromkeys([*here, *(leaf for leaves in groups.values() for leaf in leaves)]):
            if task in logs:
                notes.append(f"{path} ran {task} more than once; its last run is compared.")
            logs[task] = _read_task(file, results, task, cluster)
        for group, leaves in groups.items():
            if _totals(results, group):
                logs[group] = _pooled(group, results, [logs[leaf] for leaf in leaves])
    if unknown := names - set(logs):
        raise UserError(f"{path} has no task {first_of(sorted(unknown))}; it has {_names_in(files)}.")
    if not logs:
        raise UserError(f"{path} names no task.")
    return Log(path, ", ".join(models), logs, list(dict.fromkeys(notes)))


def _results_files(path: Path) -> list[Path]:
    """The results files, the oldest first."""
    if path.is_file() and DATED.fullmatch(path.name):
        return [path]
    if not path.is_dir():
        reason = "is no results file of the harness" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {reason}; name a folder that lm_eval wrote with --output_path and --log_samples."
        )
    files = [file for file in path.rglob("*.json") if DATED.fullmatch(file.name)]
    if not files:
        raise UserError(
            f"{path} holds no results_DATE.json, so lm_eval (0.4.3 or later) wrote no results there."
        )
    return sorted(files, key=lambda file: DATED.fullmatch(file.name)[1])


def _names_in(files: list[Path]) -> str:
    return first_of(sorted({task for file in files for task in _json_of(file)["results"]}))


def _json_of(file: Path) -> dict:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no whole JSON file: {error}.") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise UserError(f"{file} is no results file of lm-evaluation-harness: it has no results.")
    return results


def _leaves_of_groups(results: dict) -> dict[str, list[str]]:
    """The tasks of each group, those of the groups in it included."""
    below = results.get("group_subtasks") or {}

    def leaves(name: str) -> list[str]:
        return [leaf for child in below[name] for leaf in leaves(child)] if below.get(name) else [name]

    return {group: list(dict.fromkeys(leaves(group))) for group, children in below.items() if children}


def _totals(results: dict, task: str) -> dict[Key, float]:
    totals = {}
    for key, value in results["results"].get(task, {}).items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            totals[metric, filter_name] = float(value)
    return totals


def _read_task(file: Path, results: dict, task: str, cluster: str | None) -> TaskLog:
    """Read the samples of a task.

    Raises:
        UserError: they are missing, damaged or not those of the results.
    """
    samples = file.with_name(f"samples_{task}_{DATED.fullmatch(file.name)[1]}.jsonl")
    if not samples.is_file():
        raise UserError(f"{samples} is missing: the items of {task} are only logged with --log_samples.")
    totals = _totals(results, task)
    rows: dict[str, dict[str, dict]] = {}  # by item
    scores: dict[Key, dict[str, object]] = {}
    for number, sample in _samples(samples):
        where = f"{samples}, line {number}"
        item = str(sample["doc_id"])
        rows.setdefault(item, _identity(sample, cluster, where))
        for key in _keys(sample, totals, where):
            values = scores.setdefault(key, {})
            if item in values:
                raise UserError(f"{where} scores item {item} of {task} a second time.")
            values[item] = sample[key[0]]
    expected = (results.get("n-samples") or {}).get(task, {}).get("effective", len(rows))
    if len(rows) != expected:
        raise UserError(f"{samples} holds {len(rows)} items of {task}, and {file.name} counts {expected}.")
    order = sorted(rows, key=lambda item: (len(item), item))
    for (metric, _), values in scores.items():
        if len(values) != len(rows):
            raise UserError(
                f"{samples} has no {metric} of {len(rows) - len(values)} of its {len(rows)} items."
            )
    return TaskLog(
        task=task,
        version=str((results.get("versions") or {}).get(task)),
        items=pd.DataFrame([{"item": item, **rows[item]} for item in order]),
        scores={key: [values[item] for item in order] for key, values in scores.items()},
        totals=totals,
        higher_is_better=(results.get("higher_is_better") or {}).get(task) or {},
    )


def _samples(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield each line's number and sample."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
            except ValueError:
                raise UserError(
                    f"{file}, line {number}, is no whole JSON: the file is cut short or damaged."
                ) from None
            if not isinstance(sample, dict) or "doc_id" not in sample:
                raise UserError(
                    f"{file}, line {number}, is no sample of lm-evaluation-harness: it has no doc_id."
                )
            yield number, sample


def _identity(sample: dict, cluster: str | None, where: str) -> dict[str, str]:
    """What decides whether two logs asked the same."""
    document = sample.get("doc_hash") or _digest(sample.get("doc"))
    label = document
    if cluster:
        fields = sample.get("doc")
        if not isinstance(fields, dict) or cluster not in fields:
            raise UserError(
                f"{where} has no field {cluster} in its document, by which items were to be clustered."
            )
        label = _digest(fields[cluster])
    return {
        "document": document,
        # With the answers that are scored and the settings of generation, which the harness' own digest leaves out.
        "prompt": _digest(sample.get("arguments")),
        "target": sample.get("target_hash") or _digest(str(sample.get("target"))),
        "cluster": label,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _keys(sample: dict, totals: dict[Key, float], where: str) -> list[Key]:
    """The metrics of a sample, with its filter."""
    filters = list(dict.fromkeys(filter_name for _, filter_name in totals))
    filter_name = sample.get("filter") or (filters[0] if len(filters) == 1 else None)
    if filter_name is None:
        raise UserError(f"{where} does not say of which filter ({first_of(filters)}) its scores are.")
    named = sample.get("metrics") or [metric for metric, name in totals if name == filter_name]
    return [(metric, filter_name) for metric in named if metric in sample]


def _pooled(group: str, results: dict, leaves: list[TaskLog]) -> TaskLog:
    """The items of all tasks of a group, with the group's totals."""
    shared = [key for key in leaves[0].scores if all(key in leaf.scores for leaf in leaves)]
    directions = (results.get("higher_is_better") or {}).get(group) or leaves[0].higher_is_better
    tables = [leaf.items.assign(item=leaf.task + "/" + leaf.items["item"]) for leaf in leaves]
    return TaskLog(
        task=group,
        version=", ".join(dict.fromkeys(leaf.version for leaf in leaves)),
        items=pd.concat(tables, ignore_index=True),
        scores={key: [value for leaf in leaves for value in leaf.scores[key]] for key in shared},
        totals=_totals(results, group),
        higher_is_better=directions,
    )


def check_same_items(logs: list[TaskLog], paths: list[Path], *, other_prompts: bool) -> None:
    """Raise a UserError, with their number, if logs of a task have other items, prompts or scoring.

    Args:
        other_prompts: whether the same documents may have been asked in other words.
    """
    first = logs[0]
    for log, path in zip(logs[1:], paths[1:], strict=True):
        pair = f"{paths[0]} and {path}"
        if log.version != first.version:
            raise UserError(
                f"{pair} ran {first.task} in versions {first.version} and {log.version}, which score otherwise."
            )
        if others := _differing(first, log, IDENTITY):
            raise UserError(
                f"{pair} do not have the same items of {first.task}: {others} of {len(first.items)} and {len(log.items)} "
                "differ in id, document or target; compare runs with the same --limit, --samples and data."
            )
        others = 0 if other_prompts else _differing(first, log, ["item", "prompt"])
        if others:
            raise UserError(
                f"{pair} do not ask {first.task} in the same words: {others} of {len(first.items)} prompts differ (few-shot "
                "examples, chat template or settings of generation); --other-prompts compares them all the same."
            )


def _differing(first: TaskLog, other: TaskLog, columns: list[str]) -> int:
    """How many items of either log have no counterpart in the other."""
    rows, other_rows = (set(log.items[columns].itertuples(index=False, name=None)) for log in (first, other))
    return len({row[0] for row in rows ^ other_rows})
