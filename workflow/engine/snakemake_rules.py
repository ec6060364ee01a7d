"""The stages of dvc.yaml as rules for the Snakefile, and marks for those that DVC calls up to date."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dvc.repo import Repo
from dvc.stage import PipelineStage

from workflow.engine.dvc_repository import stage_graph, stale_stages
from workflow.engine.engine_locks import SNAKEMAKE
from workflow.runtime.gpus import MEASURING
from workflow.runtime.stage import FAILED, log_file

# Holds an empty file for each stage that DVC calls up to date: the outputs of Snakemake's rules.
MARKS = SNAKEMAKE / "dvc"
# What Snakemake sets for every job (snakemake/shell.py) and the numeric libraries read.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS")  # fmt: skip


@dataclass(frozen=True)
class ReportFile:
    """A small output that `snakemake --report` shows, from `meta.report` of its stage.

    Attributes:
        path: of the output.
        caption: path of a text in reStructuredText.
        category: the heading under which the report lists it.
        labels: columns of that list.
    """

    path: str
    caption: str
    category: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Rule:
    """A stage of dvc.yaml, or one item of its matrix, as a rule of Snakemake's.

    Attributes:
        name: as `dvc stage list` shows it.
        upstream: names of the stages whose outputs it reads.
        resources: what a job needs, from `meta.resources`.
        command: what a job runs.
        report_files: outputs that Snakemake's own report shows.
    """

    name: str
    upstream: tuple[str, ...]
    resources: dict[str, int]
    command: str
    report_files: tuple[ReportFile, ...]

    @property
    def mark(self) -> str:
        """Path of the file that says "up to date"."""
        return str(MARKS / self.name)

    @property
    def log(self) -> str:
        """Path of the log that a job writes."""
        return str(log_file(self.name))

    @property
    def upstream_marks(self) -> list[str]:
        """Paths of the marks of the stages whose outputs it reads."""
        return [str(MARKS / name) for name in self.upstream]


def load_rules(
    repo: Repo,
    *,
    gpus: bool = True,
    processes: Mapping[str, int] = MappingProxyType({}),
    alone: int | None = None,
) -> list[Rule]:
    """Return a rule for each stage of dvc.yaml. No output is read, so this is safe while jobs run.

    Args:
        repo: an open repository.
        gpus: whether jobs may request GPUs.
        processes: number of processes by variant; 1 for a variant that is not in it.
        alone: how many GPUs a stage that measures requests on a machine without any, where `gpu` says how many stages
            compute at once: all, so that it measures no other. None where each stage locks its GPU.
    """
    graph = stage_graph(repo)
    pull = bool(repo.config["core"].get("remote"))
    return [
        Rule(
            name=stage.name,
            upstream=tuple(sorted(dependency.name for dependency in graph.successors(stage))),
            resources=_resources(stage, gpus=gpus, processes=processes, alone=alone),
            command=job_command(stage.name, pull=pull),
            report_files=_report_files(stage),
        )
        for stage in graph
    ]


def _resources(
    stage: PipelineStage, *, gpus: bool, processes: Mapping[str, int], alone: int | None
) -> dict[str, int]:
    meta = stage.meta or {}
    resources = dict(meta.get("resources", {}))
    if "gpu" in resources:
        resources["gpu"] *= processes.get(meta.get("processes_of", ""), 1) if gpus else 0
        if alone is not None and stage.name.partition("@")[0] in MEASURING:
            resources["gpu"] = alone
    return resources


def _report_files(stage: PipelineStage) -> tuple[ReportFile, ...]:
    report = (stage.meta or {}).get("report", {})
    labels = {key: str(value) for key, value in (report.get("labels") or {}).items()}
    return tuple(
        ReportFile(
            path=path,
            caption=report.get("caption"),
            category=report.get("category"),
            labels={"file": Path(path).name, **labels},
        )
        for path in report.get("files", [])
    )


def cluster_offers_gpus(device: str) -> bool:
    """Return whether jobs should request GPUs from a cluster.

    With `auto` they do if SLURM lists one; other schedulers get what dvc.yaml says.

    Args:
        device: `hardware.device` of the params.
    """
    if device == "auto" and shutil.which("sinfo"):
        listing = subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True)
        return listing.returncode != 0 or "gpu" in listing.stdout
    return device != "cpu"


def job_command(name: str, *, pull: bool) -> str:
    """Return the shell command that brings one stage up to date whose dependencies are.

    Its output goes to the stage's log; if it fails, the terminal shows the line that says what failed.

    Args:
        name: the stage's name.
        pull: whether to fetch missing outputs from the default remote; fails without one.
    """
    repro = f"{shlex.quote(sys.executable)} -m workflow.pipeline dvc --wait-for-lock repro --single-item"
    stage, log = shlex.quote(f"dvc.yaml:{name}"), shlex.quote(str(log_file(name)))
    # `--pull` calls a stage done while a file that only git holds is missing: plain repro has the last word.
    command = f"{repro} --pull {stage} && {repro} {stage}" if pull else f"{repro} {stage}"
    no_log = shlex.quote(
        f"{name}: {FAILED}, and its log {log_file(name)} could not be written: is the disk full?"
    )
    show = f"grep -a {shlex.quote(f': {FAILED}: ')} {log} || tail -n 1 {log} | grep . || echo {no_log}"
    return f"{_restore_thread_variables()}; ({command}) > {log} 2>&1 || {{ ({show}) >&2; exit 1; }}"


def _restore_thread_variables() -> str:
    """Return shell code that undoes Snakemake's limit of one thread a job, which would change a run's last digits.

    Jobs that compute with the model run one at a time, or have the cores that a cluster binds them to.
    """
    values = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    return "; ".join(
        f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"
        for name, value in values.items()
    )


def mark_fresh_stages(repo: Repo) -> set[str]:
    """Make the marks agree with DVC: one for each stage that neither changed nor follows a changed one.

    Returns:
        The names of these stages.
    """
    graph = stage_graph(repo)
    fresh = {stage.name for stage in set(graph) - stale_stages(repo)}
    MARKS.mkdir(parents=True, exist_ok=True)
    # Correct marks are left alone, so that a dry run does not disturb a run in progress.
    for mark in MARKS.iterdir():
        if mark.name not in fresh:
            mark.unlink(missing_ok=True)
    for name in fresh:
        (MARKS / name).touch()
    report_paths = (Path(file.path) for stage in graph for file in _report_files(stage))
    _forget_metadata([*(MARKS / name for name in fresh), *report_paths])
    return fresh


def _forget_metadata(paths: Iterable[Path]) -> None:
    """Drop what Snakemake remembers of these files.

    A killed job, or inputs that changed since, would otherwise overrule DVC when it calls a stage up to date.
    """
    from snakemake.io import IOFile
    from snakemake.persistence.file import FilePersistence

    persistence = FilePersistence(path=SNAKEMAKE.absolute())
    for path in paths:
        persistence.cleanup_metadata(IOFile(str(path)))
