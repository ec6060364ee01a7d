"""Compare the files of the page with dvc.lock.

DVC locks the repository while the page is rendered, and writes the page's entry only afterwards. So the files are read
and hashed here, and `dvc status` is not called. The inputs that a result recorded are compared with dvc.lock as well.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow.runtime import digests, dvc_lock, inputs
from workflow.runtime.dvc_lock import Difference, LockedStage
from workflow.runtime.dvc_yaml import Definition, definitions
from workflow.runtime.files import read_yaml
from workflow.runtime.paths import DVC_LOCK, DVC_YAML, HARDWARE, PARAMS, RESULTS

OWN_STAGE = "report"  # its entry describes the previous page


@dataclass(frozen=True)
class Origin:
    """The origin of a file, from dvc.lock."""

    stage: str
    md5: str
    params: dict[str, Any]  # of the stage's run

    @property
    def command(self) -> str:
        """The command that reproduces the file."""
        return f"dvc repro {self.stage}"


@dataclass(frozen=True)
class Lock:
    """The state of the workspace against dvc.lock.

    Attributes:
        exists: whether there is a dvc.lock.
        origins: the origin of each file that a stage wrote, by path.
        mismatches: a sentence for each difference between the workspace and dvc.lock.
        absent: missing outputs that the page does not need.
    """

    exists: bool
    origins: dict[str, Origin]
    mismatches: list[str]
    absent: list[str]


def read(needed: Iterable[Path]) -> Lock:
    """Compare the workspace with the entries of all stages behind the needed files.

    Args:
        needed: the files that the page is made from. Those outside results/ belong to no stage.

    Raises:
        UserError: dvc.lock, dvc.yaml or params.yaml cannot be read.
    """
    needed = list(needed)
    if not DVC_LOCK.is_file():
        return Lock(False, {}, ["There is no dvc.lock, so no file could be held against it."], [])
    stages = {name: stage for name, stage in dvc_lock.read().items() if name.partition("@")[0] != OWN_STAGE}
    origins = {
        path: Origin(name, md5 or "", stage.params)
        for name, stage in stages.items()
        for path, md5 in stage.outs.items()
    }
    strays = [path for path in needed if path.as_posix() not in origins and _is_of_a_stage(path)]
    used = _upstream(
        stages, {origins[path.as_posix()].stage for path in needed if path.as_posix() in origins}
    )
    differences = list(dvc_lock.differences(used, read_yaml(PARAMS), _digester()))
    return Lock(
        exists=True,
        origins=origins,
        mismatches=[
            *(f"{path} is in no stage of dvc.lock." for path in strays),
            *_changed_outputs(differences, {path.as_posix() for path in needed}),
            *_other_records(used, {path.as_posix() for path in needed}, differences),
            *_stale_stages(used, differences, origins),
        ],
        absent=sorted(
            difference.name for difference in differences if difference.kind == "out" and difference.missing
        ),
    )


def _is_of_a_stage(path: Path) -> bool:
    """Whether a stage must have written a file. The measurements of `make benchmark` belong to none."""
    return path.is_relative_to(RESULTS) and not path.is_relative_to(HARDWARE)


def _digester() -> Callable[[str], str | None]:
    """Return a function that gives the md5 of a file or folder, and hashes each file once."""
    known = {Path(path): md5 for path, md5 in inputs.known_digests().items()}

    def digest_of(name: str) -> str | None:
        path = Path(name)
        files = digests.files_of(path)
        known.update(digests.digests(file for file in files if file not in known))
        return digests.known_digest(path, {file: known[file] for file in files}) if path.exists() else None

    return digest_of


def _upstream(stages: Mapping[str, LockedStage], names: Iterable[str]) -> dict[str, LockedStage]:
    """The named stages and all stages upstream of them, in the order of dvc.lock."""
    upstream, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in upstream:
            upstream.add(name)
            # A folder that is read can hold outputs of stages that params do not name: they do not count.
            deps = stages[name].deps
            waiting += [
                other for other, stage in stages.items() if any(_written_by(dep, stage.outs) for dep in deps)
            ]
    return {name: stage for name, stage in stages.items() if name in upstream}


def _written_by(path: str, outs: Mapping[str, object]) -> bool:
    """Whether a path is one of the outputs, or a file in one that is a folder."""
    return any(each.as_posix() in outs for each in (Path(path), *Path(path).parents))


def _is_output(path: str, outs: Mapping[str, object]) -> bool:
    """Whether stages wrote what lies at a path: as an output, within one, or as a folder of them."""
    return _written_by(path, outs) or any(out.startswith(f"{path}/") for out in outs)


def _changed_outputs(differences: list[Difference], needed: set[str]) -> list[str]:
    """A sentence for each output that changed after its stage, and each needed one that is missing."""
    outputs = [difference for difference in differences if difference.kind == "out"]
    return [
        f"{output.name} is missing."
        if output.missing
        else f"{output.name} is not what stage {output.stage} wrote: its md5 is not that in dvc.lock."
        for output in outputs
        if not output.missing or output.name in needed
    ]


def _other_records(
    stages: Mapping[str, LockedStage], needed: set[str], differences: list[Difference]
) -> list[str]:
    """A sentence for each input that a result recorded with another value than dvc.lock."""
    changed = {difference.name for difference in differences if difference.kind == "out"}
    return [
        f"{path} was made with {contradiction}."
        for stage in stages.values()
        for path in stage.outs
        if path in needed and path not in changed and path.endswith(".json")
        for contradiction in inputs.contradictions(
            inputs.record_in(Path(path)), params=stage.params, deps=stage.deps
        )
    ]


def _stale_stages(
    stages: Mapping[str, LockedStage], differences: list[Difference], origins: Mapping[str, Origin]
) -> list[str]:
    """A sentence for each reason to run stages again: a file, a param, or the definition in dvc.yaml."""
    names_by_reason: dict[str, list[str]] = {}
    for difference in differences:
        match difference:
            case Difference(kind="param", name=name):
                reason = f"params.yaml has another value of {name}"
            case Difference(kind="dep", missing=True, name=name) if not _is_output(name, origins):
                reason = f"{name} is gone"  # a missing output is listed in `absent`
            case Difference(kind="dep", missing=False, name=name):
                reason = f"{name} has changed since"
            case _:
                continue
        names_by_reason.setdefault(reason, []).append(difference.stage)
    defined = definitions() if DVC_YAML.is_file() else None
    if defined is not None:
        redefined = [name for name, stage in stages.items() if defined.get(name) != _definition(stage)]
        names_by_reason |= {"dvc.yaml describes it otherwise": redefined} if redefined else {}
    return [
        f"{'Stages' if len(names) > 1 else 'Stage'} {', '.join(names)} would run again: {reason}."
        for reason, names in names_by_reason.items()
    ]


def _definition(stage: LockedStage) -> Definition:
    """The definition of a stage when it was run."""
    return Definition(
        stage.command,
        deps=frozenset(stage.deps),
        params=frozenset(stage.params),
        outs=frozenset(stage.outs),
    )
