"""The stages that dvc.yaml defines, with its matrices resolved: by DVC, or for a stage that starts, without it.

`Repo.stage` is not public API of DVC, so this stands alone.
"""

import re
from dataclasses import dataclass
from typing import Any

from workflow.runtime.dvc_lock import value_at
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_yaml
from workflow.runtime.paths import DVC_YAML, PARAMS

REFERENCE = re.compile(r"\$\{(?:item\.)?(\w+)\}")
FIRST_OF_LIST = re.compile(r"\$\{([\w.]+)\[0\]\}")  # of params.yaml


@dataclass(frozen=True)
class Definition:
    """What a stage runs, reads and writes: paths, and dotted keys of params.yaml."""

    command: str
    deps: frozenset[str]
    params: frozenset[str]
    outs: frozenset[str]


@dataclass(frozen=True)
class Entries:
    """What a stage reads, in the order of dvc.yaml.

    Attributes:
        stage: as DVC names it, train@lora_16bit-1.
        deps: paths.
        params: dotted keys of params.yaml.
    """

    stage: str
    deps: list[str]
    params: list[str]


def entries_of(name: str, item: dict[str, Any]) -> Entries | None:
    """What one stage reads. Every stage asks this as it starts, and importing DVC takes seconds.

    Args:
        name: the stage's name in dvc.yaml.
        item: the values of its matrix by name; of a stage for each entry of a mapping, the entry's key.

    Returns:
        None for a stage that dvc.yaml does not have.
    """
    definition = read_yaml(DVC_YAML)["stages"].get(name) if DVC_YAML.is_file() else None
    if definition is None:
        return None
    values = {key: str(value) for key, value in item.items()}
    stage = name + ("@" + "-".join(values.values()) if values else "")
    if "foreach" in definition:
        (key,) = values.values()
        mapping = value_at(read_yaml(PARAMS), definition["foreach"].removeprefix("${").removesuffix("}"))
        values = {"key": key} | {part: str(value) for part, value in ((mapping or {}).get(key) or {}).items()}
        definition = definition["do"]

    def first(match: re.Match) -> str:
        listed = value_at(read_yaml(PARAMS), match[1]) if PARAMS.is_file() else None
        return str(listed[0]) if isinstance(listed, list) and listed else match[0]

    def resolved(kind: str) -> list[str]:
        entries = (
            FIRST_OF_LIST.sub(
                first, REFERENCE.sub(lambda match: values.get(match[1], match[0]), entry).rstrip("/")
            )
            for entry in definition.get(kind, [])
        )
        return list(
            dict.fromkeys(entries)
        )  # the baseline's files are those of a variant, and may be this one's

    return Entries(stage, resolved("deps"), resolved("params"))


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
