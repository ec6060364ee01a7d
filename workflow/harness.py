"""lm-evaluation-harness: find and load the tasks that params name, and call it as its command line does.

A task is one of workflow/tasks/, which score the test split, or one of the harness' own, by name. Its data
come from where the harness says (the hub, once, in stage fetch_tasks), or from local files that params map
to its splits. The mapping is a group file of the harness, which refers to the task by name and replaces the
source of its data alone, so that the harness' command line can read it as well.
"""

import difflib
import functools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from ruamel.yaml import YAML

from workflow import faults, params
from workflow.errors import UserError
from workflow.files import sha256, whole_folder
from workflow.paths import FETCHED_TASKS, TASKS

NAME = f"lm-evaluation-harness {lm_eval.__version__}"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Call:
    """One call of the harness: the arguments that the stage and the command line share."""

    task: str  # its name in params
    spec: str  # its name for the harness
    include_path: Path | None
    items: int | None
    few_shot: int | None
    chat_template: bool
    generation: dict[str, int]
    metadata: dict[str, int]

    def arguments(self) -> list[str]:
        """Those of `lm_eval run` that say what is asked of the model."""
        words: list[Any] = ["--tasks", self.spec]
        if self.include_path:
            words += ["--include_path", self.include_path]
        if self.items is not None:
            words += ["--limit", self.items]
        if self.few_shot is not None:
            words += ["--num_fewshot", self.few_shot]
        if self.chat_template:
            words += ["--apply_chat_template"]
        if self.generation:
            words += ["--gen_kwargs", ",".join(f"{key}={value}" for key, value in self.generation.items())]
        if self.metadata:
            words += ["--metadata", json.dumps(self.metadata)]
        return [str(word) for word in words]


def call_of(name: str, evaluation: params.Evaluation) -> Call:
    """How the harness is to be called for a task of params."""
    task = evaluation.tasks[name]
    own = name in params.OWN_TASKS
    generates = name == "holdout_generation"
    return Call(
        task=name,
        spec=f"{name}_from_files" if task.files else name,
        include_path=TASKS if own else FETCHED_TASKS if task.files else None,
        items=task.items,
        few_shot=task.few_shot,
        chat_template=task.chat_template,
        generation={"max_gen_toks": evaluation.answer_tokens} if generates else {},
        metadata={"answer_tokens": evaluation.answer_tokens} if generates else {},
    )


def run(call: Call, model: LM) -> dict:
    """Score a model; the harness' own result, with every sample.

    Raises:
        UserError: the task cannot be loaded, which stage fetch_tasks finds before anything is trained.
    """
    manager = _manager(call.include_path, json.dumps(call.metadata))
    with _named(call.task, "; `dvc repro --force fetch_tasks` gets its data"):
        leaves = manager.load([call.spec])["tasks"]
    return lm_eval.simple_evaluate(
        model,
        tasks=list(leaves.values()),
        num_fewshot=call.few_shot,
        limit=call.items,
        task_manager=manager,
        apply_chat_template=call.chat_template,
        gen_kwargs=dict(call.generation) or None,
        log_samples=True,
        bootstrap_iters=0,  # the harness' own intervals are unpaired; ours are taken over the items
    )


@functools.cache
def _manager(include_path: Path | None, metadata: str) -> TaskManager:
    # Its own tasks are thousands of files, which are read for seconds: left out where none is wanted.
    return TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path != TASKS,
        metadata=json.loads(metadata),
    )


def fetch(evaluation: params.Evaluation) -> list[dict]:
    """Get the data of every task that is not our own, and load it as an evaluation will.

    Local files are checked and copied, with the group files that map them, into results/fetch_tasks/tasks;
    what comes from a hub stays in the datasets library's cache.

    Returns:
        What was found of each leaf task: version, kind of output, items, and where its data come from.

    Raises:
        UserError: a task is not one of the harness', its data are not to be had or do not fit it, or it
            runs code that a model wrote.
    """
    faults.keep_secrets_out_of_logs()
    with whole_folder(FETCHED_TASKS) as folder:
        for name, task in evaluation.tasks.items():
            if task.files:
                _map_files(name, task.files, folder)
    _manager.cache_clear()  # what was there before is not what is there now
    try:
        return [about for name in evaluation.tasks for about in _load(name, evaluation)]
    except Exception:
        shutil.rmtree(FETCHED_TASKS)
        raise


def _load(name: str, evaluation: params.Evaluation) -> list[dict]:
    """Load one task and build a request of each of its leaves."""
    if name in params.OWN_TASKS:
        return []
    manager = _manager(FETCHED_TASKS, "{}")
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise UserError(
            f"evaluation.tasks names {name}, which is no task of {NAME}"
            + (f"; near to it are {', '.join(near)}." if near else ".")
        )
    with _named(name, ""):
        leaves = manager.load([call_of(name, evaluation).spec])["tasks"]
        for leaf in leaves.values():
            _try(leaf, evaluation.tasks[name])
        asked, most = evaluation.tasks[name].items or 0, max(len(leaf.eval_docs) for leaf in leaves.values())
        if asked > most:
            raise ValueError(f"items is {asked}, and there are {most} (null is for all)")
    return [{"task": name, "leaf": key, **_about(leaf)} for key, leaf in leaves.items()]


def _try(leaf: Task, asked: params.Task) -> None:
    """Build the first item's requests as an evaluation does, examples in the prompt included."""
    if getattr(leaf, "UNSAFE_CODE", False):
        raise ValueError("it runs code that a model wrote, which this project does not do")
    if asked.few_shot is not None and leaf.get_config("num_fewshot") != 0:
        leaf.set_config(key="num_fewshot", value=asked.few_shot)
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
    """The commit of the hub's repository that the data came from, as the datasets library's cache names it."""
    files = [
        file["filename"] for split in leaf.dataset.values() for file in getattr(split, "cache_files", [])
    ]
    found = [match[1] for name in files if (match := re.search(r"[/\\]([0-9a-f]{40})[/\\]", name))]
    return found[0] if found else None


@contextmanager
def _named(name: str, advice: str) -> Iterator[None]:
    """Turn whatever a task raises while it is loaded into one sentence: tasks run code of many authors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if faults.sentence(error):
            raise
        why = faults.why_not_fetched(error)
        while error.__cause__ is not None:  # the datasets library says no more than that something failed
            error = error.__cause__
        what = why or str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):
            what = f"it has no {what}"
        elif isinstance(error, ImportError) and getattr(error, "name", None):
            what = f"it needs the Python package {error.name}"
        first = what.splitlines()[0].rstrip(".")
        raise UserError(f"evaluation.tasks.{name} cannot be loaded: {first}{advice}.") from None


def _map_files(name: str, files: dict[str, params.LocalFile], folder: Path) -> None:
    """Copy a task's files into `folder` and write the group file that makes the harness read them."""
    entry = _manager(None, "{}").task_index.get(name)
    if entry is None or entry.yaml_path is None or entry.kind != Kind.TASK:
        raise UserError(
            f"evaluation.tasks.{name} has files, and {name} is not a single task of {NAME} with a YAML of its own."
        )
    config = load_yaml(entry.yaml_path, resolve_func=False)
    evaluated = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    if not set(evaluated) & set(files):
        raise UserError(
            f"evaluation.tasks.{name}.files has {', '.join(files)}, and the task is scored on "
            f"{' or '.join(evaluated)}."
        )
    data = {}
    for split, file in files.items():
        source = Path(file.path)
        if not source.is_file():
            raise UserError(f"evaluation.tasks.{name}.files.{split}.path is {source}, which is not a file.")
        if not source.stat().st_size:
            raise UserError(f"evaluation.tasks.{name}.files.{split}: {source} is empty.")
        if (digest := sha256(source)) != file.sha256:
            raise UserError(
                f"evaluation.tasks.{name}.files.{split}: {source} has sha256 {digest}, and params.yaml names "
                f"{file.sha256}."
            )
        copy = folder / name / f"{split}{source.suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        data[split] = (FETCHED_TASKS / name / copy.name).as_posix()
    suffixes = {Path(path).suffix for path in data.values()}
    if len({BUILDERS[suffix] for suffix in suffixes}) > 1:
        raise UserError(f"evaluation.tasks.{name}.files are of several kinds: {', '.join(sorted(suffixes))}.")
    # Splits that no file holds are taken from the task, or it would look for them.
    mapped = {
        "task": name,
        "dataset_path": BUILDERS[suffixes.pop()],
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
