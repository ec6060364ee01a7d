"""The stages that dvc.yaml defines, with its matrices resolved by DVC.

`Repo.stage` is not public API of DVC, so this stands alone.
"""

from dataclasses import dataclass

from workflow.runtime.errors import UserError
from workflow.runtime.paths import DVC_YAML


@dataclass(frozen=True)
class Definition:
    """What a stage runs, reads and writes: paths, and dotted keys of params.yaml."""

    command: str
    deps: frozenset[str]
    params: frozenset[str]
    outs: frozenset[str]


def definitions() -> dict[str, Definition]:
    """Every stage by name, one for each item of a matrix. No lock is taken: `dvc repro` may be running.

    Raises:
        UserError: DVC refuses dvc.yaml or a param that it names.
    """
    from dvc.dependency import ParamsDependency
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(uninitialized=True) as repo:
            stages = repo.stage.load_all(DVC_YAML.as_posix())
    except DvcException as error:
        raise UserError(f"DVC: {error}") from error
    return {
        stage.name: Definition(
            stage.cmd,
            deps=frozenset(dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)),
            params=frozenset(
                key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params
            ),
            outs=frozenset(out.def_path for out in stage.outs),
        )
        for stage in stages
    }
