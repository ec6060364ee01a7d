"""The DVC repository of a folder and its graph of stages.

DVC's index is not a public API; besides the two `dvc_patch_*` modules, only this room uses it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import networkx as nx
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage import PipelineStage

from workflow.engine import dvc_patch_state, dvc_repair
from workflow.runtime import faults
from workflow.runtime.errors import UserError


@contextmanager
def open_repo(root: Path | str = ".") -> Iterator[Repo]:
    """Yield the DVC repository at `root`, repaired if a killed process left it damaged.

    Running jobs hold the repository's lock now and then, so every operation in the block waits for it.

    Raises:
        UserError: DVC or the system refused something in the block, such as an invalid dvc.yaml.
    """
    check_path(root)
    try:
        with (
            faults.as_user_errors(),
            dvc_patch_state.applied(),
            Repo(root, _wait_for_lock=True) as repo,
        ):
            dvc_repair.repair(repo)
            yield repo
    except DvcException as error:
        raise UserError(f"DVC: {error}") from error


def check_path(root: Path | str = ".") -> None:
    """Check that DVC can work in a folder.

    Raises:
        UserError: the folder's path has braces, which DVC's progress bars take for placeholders.
    """
    path = Path(root).resolve()
    if {"{", "}"} & set(str(path)):
        raise UserError(f"DVC cannot work in a folder whose path has braces: move {path} to another path.")


def stage_graph(repo: Repo) -> nx.DiGraph:
    """Return DVC's graph of stages, in which an edge points from a stage to one that it depends on."""
    graph = repo.index.graph
    return graph.subgraph(node for node in graph if isinstance(node, PipelineStage))


def stale_stages(repo: Repo) -> set[PipelineStage]:
    """Return the stages that changed since they ran, or that follow a changed one."""
    changed, following = changed_and_following(repo)
    return changed | following


def changed_and_following(repo: Repo) -> tuple[set[PipelineStage], set[PipelineStage]]:
    """Return the stages that changed since they ran, and those that only follow one.

    The latter run if an output that they read becomes another one.
    """
    with repo.lock:
        graph = stage_graph(repo)
        changed = {stage for stage in graph if _is_changed(stage)}
    return changed, set().union(*(nx.ancestors(graph, stage) for stage in changed)) - changed


def _is_changed(stage: PipelineStage) -> bool:
    try:
        return stage.changed()
    except LockError:  # a job is writing its outputs right now
        return True
