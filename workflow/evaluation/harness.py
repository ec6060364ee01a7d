"""lm-evaluation-harness: find the tasks that params name, and call it as its command line does.

A task is one of workflow/evaluation/tasks/, which score the test split, or one of the harness' own, by name. Its data
come from where the harness says (the hub, once, in stage fetch_tasks), or from local files that params map
to its splits. The mapping is a group file of the harness, which refers to the task by name and replaces the
source of its data alone, so that the harness' command line can read it as well.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from workflow import params
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.paths import FETCHED_TASKS, TASKS

NAME = f"lm-evaluation-harness {lm_eval.__version__}"


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
    task_manager = manager(call.include_path, json.dumps(call.metadata))
    with named(call.task, "; `dvc repro --force fetch_tasks` gets its data"):
        leaves = task_manager.load([call.spec])["tasks"]
    return lm_eval.simple_evaluate(
        model,
        tasks=list(leaves.values()),
        num_fewshot=call.few_shot,
        limit=call.items,
        task_manager=task_manager,
        apply_chat_template=call.chat_template,
        gen_kwargs=dict(call.generation) or None,
        log_samples=True,
        bootstrap_iters=0,  # the harness' own intervals are unpaired; ours are taken over the items
    )


@functools.cache
def manager(include_path: Path | None, metadata: str) -> TaskManager:
    """The harness' index of tasks, with those of a folder of ours."""
    # Its own tasks are thousands of files, which are read for seconds: left out where none is wanted.
    return TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path != TASKS,
        metadata=json.loads(metadata),
    )


@contextmanager
def named(name: str, advice: str) -> Iterator[None]:
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
