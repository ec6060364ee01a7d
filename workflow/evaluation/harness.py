"""lm-evaluation-harness: find the tasks that params name, and call the harness as its command line does.

A task is either one of workflow/evaluation/tasks/, which score the test split, or one of the harness' own. Its data
come from where the harness says (the hub, once, in stage fetch_tasks), or from local files that params map to its
splits. The mapping is a group file of the harness: it refers to the task by name and replaces only the source of the
data, so the harness' command line can read it as well.
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
from torch.utils import collect_env

from workflow import params
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.paths import FETCHED_TASKS, TASKS

# The harness describes the machine after each call, by a dozen programs that take half a second.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

NAME = f"lm-evaluation-harness {lm_eval.__version__}"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the harness, which the stage and the command line share."""

    task: str  # its name in params
    spec: str  # its name for the harness
    include_path: Path | None
    items: int | None
    few_shot: int | None
    chat_template: bool
    generation: dict[str, int]
    metadata: dict[str, int]

    def arguments(self) -> list[str]:
        """Return the arguments of `lm_eval run` that select the task and its requests."""
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
    """Return how the harness is called for a task of params."""
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
    """Score a model; return the harness' own results, with every sample.

    Raises:
        UserError: the task cannot be loaded. Stage fetch_tasks detects that before anything is trained.
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
        bootstrap_iters=0,  # the harness' intervals are unpaired; ours are computed from the items
    )


@functools.cache
def manager(include_path: Path | None, metadata: str) -> TaskManager:
    """Return the harness' index of tasks, with those of one of our folders."""
    # Reading the thousands of files of its own tasks takes seconds, so they are skipped where only ours are needed.
    return TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path != TASKS,
        metadata=json.loads(metadata),
    )


@contextmanager
def named(name: str, advice: str) -> Iterator[None]:
    """Turn any error while a task is loaded into one sentence: tasks run code of many authors.

    Args:
        name: of the task in params.
        advice: the end of the sentence.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if faults.sentence(error):
            raise
        why = faults.why_not_fetched(error)
        while error.__cause__ is not None:  # the datasets library says only that something failed
            error = error.__cause__
        reason = why or str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        elif isinstance(error, ImportError) and getattr(error, "name", None):
            reason = f"it needs the Python package {error.name}"
        first_line = reason.splitlines()[0].rstrip(".")
        raise UserError(f"evaluation.tasks.{name} cannot be loaded: {first_line}{advice}.") from None
