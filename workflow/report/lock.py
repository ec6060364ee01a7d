"""What dvc.lock says of the files that the page is made from, and whether the workspace still agrees with it.

DVC holds its own lock while the page is rendered, and writes the page's own entry only afterwards, so the
files are read and hashed here and DVC is not asked. What a result says of itself that it was made with is held against
the lock as well.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workflow.runtime import digests, inputs
from workflow.runtime.errors import UserError
from workflow.runtime.inputs import DVC_YAML, PARAMS, value_at
from workflow.runtime.outputs import DVC_LOCK

OWN_STAGE = "report"  # its entry is that of the page before this one
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class Origin:
    """Where a file comes from, by dvc.lock."""

    stage: str
    md5: str
    params: dict[str, Any]  # what the stage was run with

    @property
    def command(self) -> str:
        """What makes the file again."""
        return f"dvc repro {self.stage}"


@dataclass(frozen=True)
class Lock:
    """What dvc.lock and the workspace say together.

    Attributes:
        found: whether there is a dvc.lock at all.
        origins: by path, of every file that a stage wrote.
        mismatches: a sentence for each thing in which the workspace differs from it.
        absent: outputs that the page does not need and that are not in this workspace.
    """

    found: bool
    origins: dict[str, Origin]
    mismatches: list[str]
    absent: list[str]


def read(needed: Iterable[Path]) -> Lock:
    """Hold every stage that had a part in the needed files against the workspace.

    Args:
        needed: the files that the page is made from; those outside of results/ are of no stage.

    Raises:
        UserError: dvc.lock or dvc.yaml cannot be read.
    """
    needed = [path.as_posix() for path in needed]
    if not DVC_LOCK.is_file():
        return Lock(False, {}, ["There is no dvc.lock, so no file could be held against it."], [])
    stages = {n: s for n, s in _load(DVC_LOCK).get("stages", {}).items() if n.partition("@")[0] != OWN_STAGE}
    producers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}
    origins = {
        out["path"]: Origin(
            producers[out["path"]], out.get("md5", ""), stage.get("params", {}).get("params.yaml", {})
        )
        for stage in stages.values()
        for out in stage.get("outs", [])
    }
    used = _upstream(stages, [producers[path] for path in needed if path in producers])
    check = _Check(set(needed), origins)
    for path in needed:
        if path.startswith("results/") and path not in producers and not path.startswith("results/hardware/"):
            check.say(f"{path} is in no stage of dvc.lock.")
    defined = _defined() if DVC_YAML.is_file() else None
    params = _load(PARAMS)
    for name in used:
        check.outs(name, stages[name])
        check.stage(name, stages[name], params, defined)
    return Lock(
        found=True,
        origins=origins,
        mismatches=check.sentences(),
        absent=sorted(check.absent),
    )


class _Check:
    """Gathers what differs; a digest is taken once."""

    def __init__(self, needed: set[str], origins: dict[str, Origin]):
        self.needed, self.origins = needed, origins
        self.said: list[str] = []
        self.stale: dict[str, list[str]] = {}  # why, and the stages that it holds for
        self.absent: set[str] = set()
        self.files = {Path(path): md5 for path, md5 in inputs.known_digests().items()}

    def say(self, text: str) -> None:
        self.said.append(text)

    def outs(self, name: str, stage: dict) -> None:
        """Whether the outputs are those that the stage wrote, from what the lock says that it read."""
        for out in stage.get("outs", []):
            path = out["path"]
            if not Path(path).exists():
                if path in self.needed:
                    self.say(f"{path} is missing.")
                self.absent.add(path)
            elif not self._same(out):
                self.say(f"{path} is not what stage {name} wrote: its md5 is not that in dvc.lock.")
            elif path in self.needed and path.endswith(".json"):
                for text in inputs.contradictions(inputs.record_in(Path(path)), stage):
                    self.say(f"{path} was made with {text}.")

    def stage(self, name: str, stage: dict, params: dict, defined: dict[str, dict] | None) -> None:
        """Whether a stage would run again: because of a file that it reads, a param, or its own definition."""
        for dep in stage.get("deps", []):
            path = dep["path"]
            if not Path(path).exists():
                if path not in self.origins:  # else it is among the absent outputs
                    self._stale(f"{path} is gone", name)
            elif not self._same(dep):
                self._stale(f"{path} has changed since", name)
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            if value_at(params, key) != value:
                self._stale(f"params.yaml has another value of {key}", name)
        if defined is not None and defined.get(name) != _definition(stage):
            self._stale("dvc.yaml describes it otherwise", name)

    def sentences(self) -> list[str]:
        stale = [
            f"{'Stages' if len(names) > 1 else 'Stage'} {', '.join(names)} would run again: {why}."
            for why, names in self.stale.items()
        ]
        return self.said + stale

    def _stale(self, why: str, name: str) -> None:
        self.stale.setdefault(why, []).append(name)

    def _same(self, entry: dict) -> bool:
        path = Path(entry["path"])
        files = digests.files_of(path)
        self.files |= digests.digests(file for file in files if file not in self.files)
        found = {file: self.files[file] for file in files}
        return digests.known_digest(path, found) == entry.get("md5")


def _upstream(stages: dict[str, dict], wanted: list[str]) -> list[str]:
    """The stages, and all those from whose outputs they were made, in the order of dvc.lock."""
    outs = {name: [out["path"] for out in stage.get("outs", [])] for name, stage in stages.items()}
    found, waiting = set(), list(wanted)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        deps = [dep["path"] for dep in stages[name].get("deps", [])]
        # A dependency on a folder is one on all stages that write into it; of those, params name the ones that count.
        waiting += [
            other for other, paths in outs.items() if other not in found and any(p in deps for p in paths)
        ]
    return [name for name in stages if name in found]


def _defined() -> dict[str, dict]:
    """Every stage of dvc.yaml as `_definition` gives it, a matrix resolved into its items."""
    params, found = _load(PARAMS), {}
    for name, stage in _load(DVC_YAML)["stages"].items():
        matrix = {
            key: value_at(params, REFERENCE.fullmatch(values)[1]) if isinstance(values, str) else values
            for key, values in stage.get("matrix", {}).items()
        }
        for combination in itertools.product(*matrix.values()):
            item = dict(zip(matrix, map(str, combination), strict=True))
            label = name + ("@" + "-".join(item.values()) if item else "")
            found[label] = _resolved(stage, item)
    return found


def _resolved(stage: dict, item: dict[str, str]) -> dict:
    def text(value: str) -> str:
        return REFERENCE.sub(lambda match: item[match[1].removeprefix("item.")], value)

    def names(kind: str) -> list[str]:
        return [
            text(next(iter(one)) if isinstance(one, dict) else one).rstrip("/") for one in stage.get(kind, [])
        ]

    return {
        "cmd": text(stage["cmd"]),
        "deps": set(names("deps")),
        "params": set(names("params")),
        "outs": {*names("outs"), *names("metrics"), *names("plots")},
    }


def _definition(locked: dict) -> dict:
    return {
        "cmd": locked["cmd"],
        "deps": {dep["path"] for dep in locked.get("deps", [])},
        "params": set(locked.get("params", {}).get("params.yaml", {})),
        "outs": {out["path"] for out in locked.get("outs", [])},
    }


def _load(path: Path) -> dict:
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except YAMLError as error:
        raise UserError(f"{path} is not sound YAML: {' '.join(str(error).split())}") from error
