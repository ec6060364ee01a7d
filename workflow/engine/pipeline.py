"""The stages of dvc.yaml as the Snakefile needs them, and DVC's word on which of them are up to date.

DVC's index is not public API, so this and mending are the only modules that touch it.
`python -m workflow.pipeline prune` removes what is left of stages that dvc.yaml no longer has;
`python -m workflow.pipeline dvc ...` is `dvc ...` that may be killed at any moment, and waits for what runs beside it.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import networkx as nx
from dvc.dvcfile import PROJECT_FILE, load_file
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import PipelineStage

from workflow.engine.dvc_guards import guarded
from workflow.params import load
from workflow.runtime import dvc_patches, faults, mending, outputs
from workflow.runtime.errors import UserError
from workflow.runtime.lifetime import alone, locked
from workflow.runtime.mending import recorded_stage
from workflow.runtime.paths import RESULTS
from workflow.runtime.stage import FAILED, log_file, say

# Holds one empty file per stage that DVC calls up to date: the outputs of Snakemake's rules.
MARKS = Path(".snakemake") / "dvc"
# What Snakemake sets for every job (snakemake/shell.py) and the numeric libraries read.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Shown:
    """A small output that `snakemake --report` shows, as `meta.report` of its stage says."""

    path: str
    caption: str  # path of a text in reStructuredText
    category: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, or one item of its matrix.

    Attributes:
        name: as `dvc stage list` shows it.
        upstream: names of the stages whose outputs it reads.
        resources: what a job needs, from `meta.resources`.
        command: what a job runs.
        shown: what Snakemake's own report shows of its outputs.
    """

    name: str
    upstream: tuple[str, ...]
    resources: dict[str, int]
    command: str
    shown: tuple["Shown", ...]

    @property
    def mark(self) -> str:
        """Path of the file that says "up to date"."""
        return str(MARKS / self.name)

    @property
    def log(self) -> str:
        return str(log_file(self.name))

    @property
    def upstream_marks(self) -> list[str]:
        """Paths of the marks of the stages whose outputs it reads."""
        return [str(MARKS / name) for name in self.upstream]


@dataclass(frozen=True)
class Pruned:
    """A stage that dvc.lock has forgotten, and those of its outputs that were left where they are."""

    name: str
    left: tuple[str, ...]


@contextmanager
def open_repo(root: Path | str = ".") -> Iterator[Repo]:
    """Yield the DVC repository at `root`. Its lock is waited for, as running jobs hold it now and then.

    Raises:
        UserError: DVC refused something inside the block, such as an unsound dvc.yaml, or the system did.
    """
    _check_path(Path(root))
    try:
        with (
            faults.as_user_errors(),
            dvc_patches.whole_files(),
            Repo(root, _wait_for_lock=True) as repo,
        ):
            mending.mend(repo)
            yield repo
    except DvcException as error:
        raise UserError(f"DVC: {error}") from error


def _check_path(root: Path) -> None:
    """Refuse a folder in which DVC cannot work.

    Raises:
        UserError: its path holds braces, for which DVC's progress bars look up values.
    """
    if {"{", "}"} & set(str(root.resolve())):
        raise UserError(
            f"DVC cannot work in a folder whose path has braces: move {root.resolve()} to another path."
        )


def load_stages(
    repo: Repo, *, gpus: bool = True, processes: Mapping[str, int] = MappingProxyType({})
) -> list[Stage]:
    """Return the stages of dvc.yaml. No output is read, so this is safe while jobs run.

    Args:
        gpus: without, no stage asks for one.
        processes: of each variant; one where it is not named.
    """
    graph = _stage_graph(repo)
    pull = bool(repo.config["core"].get("remote"))
    return [
        Stage(
            name=stage.name,
            upstream=tuple(sorted(needed.name for needed in graph.successors(stage))),
            resources=_resources(stage.meta or {}, gpus=gpus, processes=processes),
            command=job_command(stage.name, pull=pull),
            shown=_shown(stage),
        )
        for stage in graph
    ]


def _resources(meta: dict[str, Any], *, gpus: bool, processes: Mapping[str, int]) -> dict[str, int]:
    asked = dict(meta.get("resources", {}))
    if "gpu" in asked:
        asked["gpu"] *= processes.get(meta.get("processes_of", ""), 1) if gpus else 0
    return asked


def _shown(stage: PipelineStage) -> tuple[Shown, ...]:
    asked = (stage.meta or {}).get("report", {})
    rest = {key: asked.get(key) for key in ("caption", "category", "labels")}
    labels = {key: str(value) for key, value in (rest.pop("labels") or {}).items()}
    return tuple(
        Shown(path=path, labels={"file": Path(path).name, **labels}, **rest)
        for path in asked.get("files", [])
    )


def cluster_offers_gpus(device: str) -> bool:
    """Whether jobs of `hardware.device` are to ask a cluster for GPUs: with `auto`, if SLURM knows of one.

    Another scheduler is asked for what dvc.yaml says.
    """
    if device == "auto" and shutil.which("sinfo"):
        told = subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True)
        return told.returncode != 0 or "gpu" in told.stdout
    return device != "cpu"


def job_command(name: str, *, pull: bool) -> str:
    """Return the shell command that brings one stage up to date, whose own dependencies are.

    What it prints goes to the stage's log; of a failure the terminal shows the line that says what failed.

    Args:
        name: the stage's name.
        pull: fetch from the default remote what is up to date but not here; fails where there is none.
    """
    repro = f"{shlex.quote(sys.executable)} -m workflow.pipeline dvc --wait-for-lock repro --single-item"
    stage, log = shlex.quote(f"dvc.yaml:{name}"), shlex.quote(str(log_file(name)))
    # `--pull` calls a stage done while a file that only git holds is missing: plain repro has the last word.
    command = f"{repro} --pull {stage} && {repro} {stage}" if pull else f"{repro} {stage}"
    nothing = shlex.quote(
        f"{name}: {FAILED}, and its log {log_file(name)} could not be written: is the disk full?"
    )
    show = f"grep -a {shlex.quote(f': {FAILED}: ')} {log} || tail -n 1 {log} | grep . || echo {nothing}"
    return f"{_threads_of_the_caller()}; ({command}) > {log} 2>&1 || {{ ({show}) >&2; exit 1; }}"


def _threads_of_the_caller() -> str:
    """Shell code that undoes Snakemake's limit of one thread a job, or a run would differ from DVC's in last digits.

    Jobs that compute with the model run one at a time, or have the cores that a cluster binds them to.
    """
    given = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    return "; ".join(
        f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"
        for name, value in given.items()
    )


def mark_fresh_stages(repo: Repo) -> set[str]:
    """Make the marks agree with DVC: one for each stage that neither changed nor follows a changed one.

    Returns:
        The names of these stages.
    """
    with repo.lock:
        graph = _stage_graph(repo)
        changed = [stage for stage in graph if _is_changed(stage)]
    stale = set(changed).union(*(nx.ancestors(graph, stage) for stage in changed))
    fresh = {stage.name for stage in set(graph) - stale}
    MARKS.mkdir(parents=True, exist_ok=True)
    # Right marks are left alone, so that a dry run takes none from a run that goes on beside it.
    for mark in MARKS.iterdir():
        if mark.name not in fresh:
            mark.unlink(missing_ok=True)
    for name in fresh:
        (MARKS / name).touch()
    _forget_records(
        [*(MARKS / name for name in fresh), *(Path(shown.path) for stage in graph for shown in _shown(stage))]
    )
    return fresh


def hold_workspace() -> IO[str]:
    """Say for as long as the returned file is open that Snakemake works here; remove what a killed one left locked.

    Snakemake's own locks outlive a process that is killed, and ask for a hand. The kernel's do not: where this
    process can have the file alone, no other Snakemake lives, and its locks are nobody's.
    """
    MARKS.mkdir(parents=True, exist_ok=True)
    file = (MARKS.parent / "running").open("a")
    if locked(file):
        shutil.rmtree(MARKS.parent / "locks", ignore_errors=True)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def wait_for_jobs() -> None:
    """Wait until no job of an earlier Snakemake, which was killed, runs here: its stage ends a little later."""
    with _jobs_file() as file:
        if not locked(file):
            say("waits for the jobs of a Snakemake that was killed")
            fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def only_engine() -> Iterator[None]:
    """Be the only engine that runs the pipeline here while the block runs; wait for another, and say so."""
    with alone("pipeline", say=say, work="the pipeline here"):
        yield


def _jobs_file() -> IO[str]:
    """What every job has locked together with the others, and `wait_for_jobs` alone."""
    MARKS.mkdir(parents=True, exist_ok=True)
    return (MARKS.parent / "jobs").open("a")


def prune(repo: Repo) -> list[Pruned]:
    """Remove stages that dvc.yaml no longer has from dvc.lock, and their outputs from the workspace.

    The outputs go because the collecting stages depend on whole folders: what a removed run leaves there
    would count in their hash here and be missing in a clone. Nothing is lost: a stage's outputs go only
    where all of them are what dvc.lock says, and DVC's cache then holds them until the stage comes back.

    Returns:
        The stages that were removed.
    """
    project = load_file(repo, str(Path(repo.root_dir, PROJECT_FILE)))
    with repo.lock:
        current = {stage.name for stage in _stage_graph(repo)}
        recorded = project.lockfile_contents.get("stages", {})
        gone = [
            recorded_stage(project, name, entry) for name, entry in recorded.items() if name not in current
        ]
        # All are saved before any is removed, as one may read another's outputs.
        saved = [stage for stage in gone if _save(repo, stage)]
        for stage in saved:
            stage.remove_outs()
        for stage in gone:
            project.remove_stage(stage)
    _remove_checkpoints(current)
    return [
        Pruned(
            stage.name, tuple(out.def_path for out in stage.outs if out.exists and not _is_taken(repo, out))
        )
        for stage in gone
    ]


def prune_and_tell() -> None:
    """Prune the repository of the working directory, and print what was removed and what was left.

    Raises:
        UserError: DVC refused, or dvc.lock cannot be read.
    """
    with open_repo() as repo:
        damaged = outputs.mend_listings()
        pruned = prune(repo)
    for place, whole in damaged:
        done = "written again" if whole else "removed"
        say(f"{place}, a list of files in DVC's cache, was damaged: {done}")
    for stage in pruned:
        say(f"{stage.name} is no longer in dvc.yaml: taken out of dvc.lock and the results")
        for path in stage.left:
            say(f"{path} was left in place: the stage is not here as dvc.lock records it")


def _remove_checkpoints(current: set[str]) -> None:
    """Remove the checkpoints of trainings that dvc.yaml no longer has and that never came to their end."""
    for folder in RESULTS.glob("train/*/*/checkpoints"):
        variant, seed = folder.parts[-3:-1]
        if f"train@{variant}-{seed}" not in current:
            shutil.rmtree(folder)
            with suppress(OSError):  # something else is in there
                folder.parent.rmdir()
                folder.parent.parent.rmdir()


def _stage_graph(repo: Repo) -> nx.DiGraph:
    """DVC's graph of stages, in which an edge points from a stage to one it needs."""
    graph = repo.index.graph
    return graph.subgraph(node for node in graph if isinstance(node, PipelineStage))


def _forget_records(outputs: Iterable[Path]) -> None:
    """Drop what Snakemake remembers of these files.

    A job that was killed, or a change of inputs since, would overrule DVC's word that a stage is up to date.
    """
    from snakemake.io import IOFile
    from snakemake.persistence.file import FilePersistence

    records = FilePersistence(path=MARKS.parent.absolute())
    for output in outputs:
        records.cleanup_metadata(IOFile(str(output)))


def _is_changed(stage: PipelineStage) -> bool:
    try:
        return stage.changed()
    except LockError:  # a job is writing its outputs right now
        return True


def _save(repo: Repo, stage: PipelineStage) -> bool:
    """Put a removed stage's run and outputs into DVC's cache, and return whether that could be done."""
    if not all(item.exists for item in (*stage.deps, *stage.outs)):
        return False
    if any(_is_taken(repo, out) or out.changed_checksum() for out in stage.outs):
        return False
    for out in stage.outs:
        out.commit(relink=False)
    repo.stage_cache.save(stage)
    return True


def _is_taken(repo: Repo, out: Output) -> bool:
    """Whether a stage of dvc.yaml writes the same path."""
    return any(out.fs.overlaps(out.fs_path, other.fs_path) for other in repo.index.outs)


def _run_dvc(arguments: list[str]) -> int:
    """Run DVC as `make report` and Snakemake's jobs do, and return its exit code."""
    _check_path(Path())
    with ExitStack() as stack:
        if "repro" in arguments and "--single-item" not in arguments:
            stack.enter_context(only_engine())
        else:  # a job of Snakemake's
            fcntl.flock(stack.enter_context(_jobs_file()), fcntl.LOCK_SH)
        with guarded():
            return dvc_patches.run(arguments, say=say)


def main() -> None:
    """Parse the command line and do as it says; exit 1 with one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.pipeline", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("prune")
    actions.add_parser("dvc", add_help=False)
    options, arguments = parser.parse_known_args()
    try:
        with faults.as_user_errors():
            if options.action == "dvc":
                sys.exit(_run_dvc(arguments))
            load()
            with only_engine():
                prune_and_tell()
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
