"""Fetch the data of the evaluation tasks, convert local files to what lm-evaluation-harness reads, and try every item.

The cells of a file reach the task exactly as written (workflow/data/tables.py). The file is copied as parquet, whose
columns have types, because the datasets library guesses the types of CSV and JSON.
"""

import difflib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from ruamel.yaml import YAML

from workflow import params
from workflow.data import tables
from workflow.evaluation import harness, task_checks
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.files import expanded, sha256, whole_folder
from workflow.runtime.paths import FETCHED_TASKS
from workflow.runtime.stage import say

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as str(int) writes it, within 64 bits
LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)


@dataclass(frozen=True)
class Split:
    """A split of a task that comes from a local file.

    Attributes:
        path: the file.
        rows: where each row stands in it, as messages say it.
        left_out: columns that could not be copied, each with the reason.
    """

    path: Path
    rows: list[str]
    left_out: list[str] = field(default_factory=list)


def fetch(evaluation: params.Evaluation) -> list[dict]:
    """Get the data of every task that is not our own, load it as an evaluation will, and try every item.

    Local files are checked and copied to results/fetch_tasks/tasks, with the group files that map them. Data from a
    hub stay in the cache of the datasets library.

    Returns:
        For each leaf task its version, type of output, number of items, and the origin of its data.

    Raises:
        UserError: the harness has no such task, the data cannot be fetched or do not fit the task, an item cannot be
            scored, or the task runs code that a model wrote.
    """
    faults.keep_secrets_out_of_logs()
    for name in evaluation.tasks:
        _check_name(name)
    mapped = {}
    with whole_folder(FETCHED_TASKS) as folder:
        for name, task in evaluation.tasks.items():
            if task.files:
                mapped[name] = _map_files(name, task.files, folder)
    harness.manager.cache_clear()  # the files of the tasks have just been replaced
    try:
        return [about for name in evaluation.tasks for about in _load(name, evaluation, mapped.get(name, {}))]
    except Exception:
        shutil.rmtree(FETCHED_TASKS)
        raise


def _check_name(name: str) -> None:
    """Raise a UserError that suggests similar names unless this is a task of ours or of the harness."""
    if name in params.OWN_TASKS:
        return
    known = [*harness.manager(None, "{}").all_tasks, *params.OWN_TASKS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UserError(
            f"evaluation.tasks names {name}, which is no task of {harness.NAME}"
            + (f"; near to it are {', '.join(near)}." if near else ".")
        )


def _load(name: str, evaluation: params.Evaluation, splits: dict[str, Split]) -> list[dict]:
    """Load one task and try every item of each leaf task."""
    if name in params.OWN_TASKS:
        return []
    task = evaluation.tasks[name]
    advice = "".join(f"; left out of {split.path}: {', '.join(split.left_out)}"
                     for split in splits.values() if split.left_out)  # fmt: skip
    if any(split.path.suffix == ".csv" for split in splits.values()):
        advice += "; a CSV holds text alone, so a task whose columns are lists or numbers needs JSON lines"
    with harness.named(name, advice):
        call = harness.call_of(name, evaluation)
        leaves = harness.manager(call.include_path, "{}").load([call.spec])["tasks"]
        for leaf in leaves.values():
            _try(leaf, task)
        available = max(len(leaf.eval_docs) for leaf in leaves.values())
        if (task.items or 0) > available:
            raise ValueError(f"items is {task.items}, and there are {available} (null is for all)")
    for key, leaf in leaves.items():
        if isinstance(leaf, ConfigurableTask):
            with _scorable(name):
                notes = task_checks.check_items(
                    leaf, items=task.items, mapped=set(splits), where=_where(leaf, splits)
                )
            for note in notes:
                say(f"  {key}: {note}")
    return [{"task": name, "leaf": key, **_about(leaf)} for key, leaf in leaves.items()]


@contextmanager
def _scorable(name: str) -> Iterator[None]:
    """Turn a ValueError about an item into a UserError about the task."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"evaluation.tasks.{name} cannot be scored: {error}.") from None


def _where(leaf: ConfigurableTask, splits: dict[str, Split]) -> task_checks.Where:
    """Return the function that says where an item comes from."""

    def where(split: str, place: int, count: int) -> str:
        source = splits.get(split)
        if source is None:
            return f"item {place + 1} of {split} of {leaf.config.dataset_path}"
        if len(source.rows) == count:
            return f"{source.path} {source.rows[place]}"
        return f"item {place + 1} of those that the task makes of {source.path}"

    return where


def _try(leaf: Task, task: params.Task) -> None:
    """Build the requests of the first item as an evaluation does, few-shot examples included.

    Raises:
        ValueError: the task runs code that a model wrote, or has too few examples.
    """
    if getattr(leaf, "UNSAFE_CODE", False):
        raise ValueError("it runs code that a model wrote, which this project does not do")
    if task.few_shot is not None and leaf.get_config("num_fewshot") != 0:
        leaf.set_config(key="num_fewshot", value=task.few_shot)
    elif leaf.get_config("num_fewshot") is None:
        leaf.set_config(key="num_fewshot", value=0)
    leaf.set_fewshot_seed(seed=0)
    try:
        leaf.build_all_requests(limit=1, rank=0, world_size=1)
    except ValueError as error:
        if "larger than population" not in str(error):
            raise
        few_shot = leaf.get_config("num_fewshot")
        raise ValueError(f"few_shot is {few_shot}, and there are not so many examples") from None


def _about(leaf: Task) -> dict:
    config = leaf.config
    return {
        "version": str(leaf.VERSION),
        "output_type": leaf.OUTPUT_TYPE,
        "items": len(leaf.eval_docs),
        "dataset": config.dataset_path,
        "subset": config.dataset_name,
        "revision": _revision(leaf),
    }


def _revision(leaf: Task) -> str | None:
    """Return the commit of the hub repository that the data came from; the cache of the datasets library names it."""
    files = [
        file["filename"] for split in leaf.dataset.values() for file in getattr(split, "cache_files", [])
    ]
    commits = [match[1] for name in files if (match := re.search(r"[/\\]([0-9a-f]{40})[/\\]", name))]
    return commits[0] if commits else None


def _map_files(name: str, files: dict[str, params.LocalFile], folder: Path) -> dict[str, Split]:
    """Copy a task's files to `folder`, and write the group file that makes the harness read them."""
    entry = harness.manager(None, "{}").task_index.get(name)
    if entry is None or entry.yaml_path is None or entry.kind != Kind.TASK:
        raise UserError(
            f"evaluation.tasks.{name} has files, and {name} is not a single task of {harness.NAME} with a YAML of its own."
        )
    config = load_yaml(entry.yaml_path, resolve_func=False)
    evaluated = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    if not set(evaluated) & set(files):
        raise UserError(
            f"evaluation.tasks.{name}.files has {', '.join(files)}, and the task is scored on "
            f"{' or '.join(evaluated)}."
        )
    splits, data = {}, {}
    for split, file in files.items():
        copy = folder / name / f"{split}.parquet"
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            splits[split] = _copy(_checked(file, f"evaluation.tasks.{name}.files.{split}"), copy, config)
        except UserError as error:
            message = error.args[0]
            raise UserError(
                message
                if message.startswith("evaluation.")
                else f"evaluation.tasks.{name} cannot be loaded: {message}"
            ) from None
        data[split] = (FETCHED_TASKS / name / copy.name).as_posix()
        for column in splits[split].left_out:
            say(f"  {name}: {file.path}: left out is {column}")
    # Splits without a file are removed from the task, which would look for them otherwise.
    mapped = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data},
        "custom_dataset": None,
        **{key: None for key in SPLIT_KEYS if config.get(key) and config[key] not in files},
    }
    examples = config.get("fewshot_config")
    if isinstance(examples, dict) and examples.get("split") and examples["split"] not in files:
        mapped["fewshot_config"] = {key: value for key, value in examples.items() if key != "split"}
    with (folder / f"{name}.yaml").open("w", encoding="utf-8") as file:
        file.write(f"# {name} as the harness defines it, on local files: written by stage fetch_tasks.\n")
        YAML().dump({"group": f"{name}_from_files", "task": [mapped]}, file)
    return splits


def _checked(file: params.LocalFile, key: str) -> Path:
    """Return the path of a local file after checking its hash."""
    source = expanded(file.path, key=f"{key}.path")
    if not source.is_file():
        raise UserError(f"{key}.path is {source}, which is not a file.")
    if not source.stat().st_size:
        raise UserError(f"{key}: {source} is empty.")
    if (digest := sha256(source)) != file.sha256:
        raise UserError(f"{key}: {source} has sha256 {digest}, and params.yaml names {file.sha256}.")
    return source


def _copy(source: Path, copy: Path, config: dict) -> Split:
    """Write the rows of a file as parquet, with every value as the file has it.

    Columns that parquet or Python cannot represent are left out. A task that needs one of them is refused later.
    """
    if source.suffix == ".parquet":
        table, left_out = _from_parquet(source)
        rows = [f"row {number}" for number in range(1, table.num_rows + 1)]
    else:
        read = {".csv": tables.read_csv, ".jsonl": tables.read_jsonl, ".json": tables.read_json}[
            source.suffix
        ]
        content = read(source)
        rows = [where for where, _ in content]
        names = list(dict.fromkeys(name for _, row in content for name in row))
        columns = {name: [row.get(name) for _, row in content] for name in names}
        if source.suffix == ".csv":
            _check_no_lists(columns, source)
            columns = _with_numbers(columns, config)
        table, left_out = _from_values(columns, rows)
    if not rows:
        raise UserError(f"{source.name} has no rows.")
    try:
        pyarrow.parquet.write_table(table, copy)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.name} cannot be copied as parquet: {str(error).splitlines()[0]}.") from None
    return Split(source, rows, left_out)


def _from_parquet(source: Path) -> tuple[pyarrow.Table, list[str]]:
    names = tables.parquet_names(source)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source.name} has two columns {twice[0]}.")
    table = tables.parquet_table(source, names)
    unreadable = {name: reason for name in names if (reason := tables.unreadable(table[name]))}
    if unreadable:
        # The datasets library stores a list of columns in the metadata, which would no longer match.
        table = table.drop_columns(list(unreadable)).replace_schema_metadata(None)
    return table, [f"column {name} ({reason})" for name, reason in unreadable.items()]


def _from_values(columns: dict[str, list], rows: list[str]) -> tuple[pyarrow.Table, list[str]]:
    converted, left_out = {}, []
    for name, values in columns.items():
        match tables.as_column(values):
            case (place, reason):
                left_out.append(f"column {name} ({rows[place]} has {reason})")
            case column:
                converted[name] = column
    return pyarrow.table(converted), left_out


def _check_no_lists(columns: dict[str, list[str]], source: Path) -> None:
    """Refuse a CSV with a column of lists: a template would silently use single characters of their text."""
    for name, cells in columns.items():
        if cells and all(map(LIST.fullmatch, cells)):
            raise UserError(
                f"{source.name} has lists in column {name}, such as {cells[0][:40]!r}, and a CSV holds text alone: "
                "write the file as JSON lines."
            )


def _with_numbers(columns: dict[str, list[str]], config: dict) -> dict[str, list]:
    """Return the columns of a CSV with numbers where the task needs them: in its labels, and where it calculates.

    A label column becomes whole numbers if each cell is one, as Python writes it, and the cells are not the texts of
    the choices themselves. Every other column remains text.
    """
    choices = config.get("doc_to_choice")
    needed = set()
    if choices is not None:
        target = config.get("doc_to_target")
        texts = columns.get(target, []) if isinstance(target, str) else []
        if not (isinstance(choices, list) and set(texts) <= set(choices)):
            needed.add(target if isinstance(target, str) else None)
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if isinstance(config.get(key), str):
            needed |= task_checks.columns_used_as_numbers(config[key])
    return {
        name: [int(cell) for cell in cells]
        if name in needed and all(map(WHOLE_NUMBER.fullmatch, cells))
        else cells
        for name, cells in columns.items()
    }
