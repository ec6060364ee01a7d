"""Remove what is left of stages that dvc.yaml no longer has."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dvc.dependency import ParamsDependency
from dvc.dvcfile import PROJECT_FILE, load_file
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import PipelineStage

from workflow.engine.dvc_repair import recorded_stage
from workflow.engine.dvc_repository import open_repo, stage_graph
from workflow.runtime import outputs
from workflow.runtime.paths import RESULTS
from workflow.runtime.stage import say


@dataclass(frozen=True)
class Pruned:
    """A stage that was removed from dvc.lock.

    Attributes:
        name: as dvc.lock had it.
        kept_paths: its outputs that stay in the workspace, because DVC's cache does not hold them.
    """

    name: str
    kept_paths: tuple[str, ...]


def prune(repo: Repo) -> list[Pruned]:
    """Remove stages that dvc.yaml no longer has from dvc.lock, and their outputs from the workspace.

    The outputs go because the collecting stages depend on whole folders: whatever a removed run leaves there would
    count in their hash here and be missing in a clone. Nothing is lost: the outputs of a stage are only removed if
    all of them match dvc.lock, and DVC's cache then holds them until the stage comes back.

    Returns:
        The stages that were removed.
    """
    project = load_file(repo, str(Path(repo.root_dir, PROJECT_FILE)))
    with repo.lock:
        current = {stage.name for stage in stage_graph(repo)}
        entries = project.lockfile_contents.get("stages", {})
        removed = [
            recorded_stage(project, name, entry) for name, entry in entries.items() if name not in current
        ]
        # Save all of them before any is removed: one may read another's outputs.
        cached = [stage for stage in removed if _save_to_cache(repo, stage)]
        for stage in cached:
            stage.remove_outs()
        for stage in removed:
            project.remove_stage(stage)
    _remove_checkpoints(current)
    return [
        Pruned(
            stage.name,
            tuple(out.def_path for out in stage.outs if out.exists and not _is_current_output(repo, out)),
        )
        for stage in removed
    ]


def prune_and_report() -> None:
    """Prune the repository of the working directory, and print what was removed and what was left.

    Raises:
        UserError: DVC refused, or dvc.lock cannot be read.
    """
    with open_repo() as repo:
        listings = outputs.repair_listings()
        pruned = prune(repo)
    for path, is_whole in listings:
        action = "written again" if is_whole else "removed"
        say(f"{path}, a list of files in DVC's cache, was damaged: {action}")
    for stage in pruned:
        say(f"{stage.name} is no longer in dvc.yaml: taken out of dvc.lock and the results")
        for path in stage.kept_paths:
            say(f"{path} was left in place: the stage is not here as dvc.lock records it")


def _remove_checkpoints(current: set[str]) -> None:
    """Remove the checkpoints of unfinished trainings that dvc.yaml no longer has."""
    for folder in RESULTS.glob("train/*/*/checkpoints"):
        variant, seed = folder.parts[-3:-1]
        if f"train@{variant}-{seed}" not in current:
            shutil.rmtree(folder)
            with suppress(OSError):  # something else is in there
                folder.parent.rmdir()
                folder.parent.parent.rmdir()


def _save_to_cache(repo: Repo, stage: PipelineStage) -> bool:
    """Put a removed stage's run and outputs into DVC's cache, and return whether that was possible."""
    if not all(item.exists for item in (*stage.deps, *stage.outs)):
        return False
    if any(_is_current_output(repo, out) or out.changed_checksum() for out in stage.outs):
        return False
    for out in stage.outs:
        out.commit(relink=False)
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):  # params may no longer have what it was run with
            dep.get_hash = lambda recorded=dep.hash_info: recorded
    repo.stage_cache.save(stage)
    return True


def _is_current_output(repo: Repo, out: Output) -> bool:
    """Return whether a stage of dvc.yaml writes the same path."""
    return any(out.fs.overlaps(out.fs_path, other.fs_path) for other in repo.index.outs)
