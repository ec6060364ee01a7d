"""Measure a variant's training in one process or in several, one after another; the result keeps what each measured.

Steps of one process share its memory layout, its files in the system's cache and what else ran beside it, so they are no
independent units. Processes are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from workflow import params
from workflow.cost import processes
from workflow.data.rows import from_rows
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl

# What is each process' own; all else is the same in all of them.
OWN = ("measurements", "seconds_per_step", "peak_gib_per_step", "load")
FAILED = "failed"


@dataclass(frozen=True)
class Job:
    """What a process needs to measure a variant."""

    variant: str
    settings: dict  # of the whole experiment, as params.yaml has them
    model_folder: str
    rows_file: str  # of the training rows


def benchmark(job: Job, *, count: int) -> Iterator[dict]:
    """Measure a variant in `count` processes; yield a `benchmark.Measured` as JSON for each.

    One alone measures in this process, which saves the start of another.

    Raises:
        UserError: a process failed; the sentence says which, and why.
    """
    if count == 1:
        yield measure(job)
        return
    results = processes.answers("workflow.cost.repeated", [asdict(job)] * count)
    for number, result in enumerate(results, 1):
        if "outcome" in result:
            raise UserError(
                f"process {number} of {count} that measure {job.variant} {result['outcome']}: {result['detail']}"
            )
        yield result


def combined(results: list[dict]) -> dict:
    """One result of several processes' results.

    Returns:
        What all have in common; `measurements`, of which each value is the geometric mean over the processes, with the
        quartiles over its steps if there is one process; and `processes`, with each one's own.
    """
    common = {key: value for key, value in results[0].items() if key not in (*OWN, "process_seconds")}
    own = [{key: result[key] for key in OWN} for result in results]
    if len(results) == 1:
        return common | {"measurements": own[0]["measurements"], "processes": own}
    means = []
    for measured in zip(*(result["measurements"] for result in results), strict=True):
        mean = math.exp(sum(math.log(m["value"]) for m in measured) / len(measured))
        means.append(measured[0] | {"value": mean, "low": None, "high": None})
    return common | {"measurements": means, "processes": own}


def measure(job: Job) -> dict:
    """Measure a variant in this process."""
    from workflow.cost import benchmark as benchmarking

    settings = params.Params.model_validate(job.settings)
    with tempfile.TemporaryDirectory() as scratch:
        measured = benchmarking.benchmark(
            settings.run(job.variant, settings.benchmark.seed),
            model_folder=Path(job.model_folder),
            train_rows=from_rows(read_jsonl(Path(job.rows_file))),
            benchmark=settings.benchmark,
            scratch=Path(scratch),
        )
    return measured.as_dict()


def _answer(job: dict) -> dict:
    """What this process measured, or the sentence of a fault that a user or the system caused."""
    try:
        with faults.as_user_errors("benchmark"):
            return measure(Job(**job))
    except UserError as error:
        return processes.missing(FAILED, str(error))


if __name__ == "__main__":
    from workflow.runtime.stage import go_offline, quiet_libraries

    go_offline()
    quiet_libraries()

    processes.answer(_answer)
