"""What a stage reads: taken down when it starts, held against dvc.lock, and still the same when it ends.

DVC takes down params and dependencies when a stage has ended, so an edit while it runs would stand in dvc.lock beside the
result of what was there before. And it trusts its cache: a damaged file comes out of it as if it were sound. A stage
therefore reads params.yaml as it was at its start, computes the md5 of all else that dvc.yaml says it reads, refuses
what is not what the lock says was written, and fails at its end if anything has changed, so that DVC records nothing.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import workflow
from workflow.runtime import digests, outputs
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_yaml, whole_file, write_json

DVC_YAML, PARAMS = Path("dvc.yaml"), Path("params.yaml")
NOTES = Path(".cache") / "inputs"  # what each stage read when it ran last
# Set while a stage runs, for it and the processes that it starts.
TAKEN_DOWN = "WORKFLOW_INPUTS"
REFERENCE = re.compile(r"\$\{item\.(\w+)\}")
MOST_NAMED = 4  # changes in one sentence


@dataclass(frozen=True)
class Content:
    """A file as it was read: its md5, and what shows that it was not written since."""

    md5: str
    identity: list[int]


@dataclass(frozen=True)
class Inputs:
    """What a stage reads, by dvc.yaml.

    Attributes:
        stage: as DVC names it, train@lora_16bit-1.
        params: by their dotted keys in params.yaml; None where there is no such key.
        deps: the files and folders, with their digest as dvc.lock has it; None where there is nothing.
        files: every file of them.
    """

    stage: str
    params: dict[str, Any]
    deps: dict[str, str | None]
    files: dict[str, Content]


@contextmanager
def taken_down(name: str, item: dict[str, Any]) -> Iterator[None]:
    """Take down what a stage reads; within the block `check` and `recorded` know it, and params are read from a copy.

    Args:
        name: the stage's in dvc.yaml; one that it does not have has nothing to take down.
        item: the values of its matrix by name.

    Raises:
        UserError: something is not what dvc.lock says was written, or is being edited; the sentence says how to get it.
    """
    inputs = take(name, item)
    if inputs is None:
        yield
        return
    outputs.check_read(inputs.deps, {Path(path): content.md5 for path, content in inputs.files.items()})
    notes = (NOTES / f"{inputs.stage}.json").absolute()
    write_json(notes, asdict(inputs))
    copy = _copy_of_params(notes)
    copy.unlink(missing_ok=True)
    if PARAMS.is_file():
        with whole_file(copy) as beside:
            shutil.copyfile(PARAMS, beside)
        if _params(list(inputs.params), copy) != inputs.params:
            raise UserError(f"{PARAMS} was edited while this stage was starting: run the same command again.")
    os.environ[TAKEN_DOWN] = str(notes)
    try:
        yield
    finally:
        del os.environ[TAKEN_DOWN]


def params_file(path: Path) -> Path:
    """Where to read a params file: within a stage, params.yaml as it was at the stage's start."""
    if path == PARAMS and TAKEN_DOWN in os.environ:
        copy = _copy_of_params(Path(os.environ[TAKEN_DOWN]))
        return copy if copy.is_file() else path
    return path


def _copy_of_params(notes: Path) -> Path:
    return notes.with_suffix(".params.yaml")


def recorded() -> dict[str, Any]:
    """What this stage read, for its result: params by key, and the digest of each dependency. Empty outside of one."""
    inputs = _current()
    return {"params": inputs.params, "deps": inputs.deps} if inputs else {}


def check() -> None:
    """Raise a UserError that names what has changed since this stage started; outside of one there is nothing to do."""
    before = _current()
    if before is None:
        return
    changes = [*_param_changes(before), *_file_changes(before)]
    if changes:
        more = len(changes) - MOST_NAMED
        named = "; ".join(changes[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(
            f"what this stage reads was edited while it ran, so nothing is recorded and the next run makes it again: {named}."
        )


def _current() -> Inputs | None:
    if TAKEN_DOWN not in os.environ:
        return None
    notes = read_json(Path(os.environ[TAKEN_DOWN]))
    return Inputs(**notes | {"files": {path: Content(**file) for path, file in notes["files"].items()}})


def _param_changes(before: Inputs) -> Iterator[str]:
    if not before.params:
        return
    try:
        now = _params(list(before.params))
    except UserError as error:  # half of an edit
        yield str(error).removesuffix(".")
        return
    for key, value in before.params.items():
        for path, old, new in differences(value, now[key], key):
            yield f"{path} in params.yaml from {shown(old)} to {shown(new)}"


def _file_changes(before: Inputs) -> Iterator[str]:
    now = {file.as_posix() for dep in before.deps for file in digests.files_of(Path(dep))}
    for path in sorted(now | set(before.files)):
        if path not in now:
            yield f"{path} is gone"
        elif path not in before.files:
            yield f"{path} is new"
        else:
            content = before.files[path]
            same = digests.identity(Path(path)) == content.identity
            # Touched, linked or put back is not changed.
            if not same and digests.digest(Path(path)) != content.md5:
                yield path


def differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Each value in which two sections of params differ: its dotted key, the one and the other; None where it lacks."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from differences(before.get(name), after.get(name), f"{key}.{name}")
    elif before != after:
        yield key, before, after


def shown(value: Any) -> str:
    """A param's value, for a sentence."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def take(name: str, item: dict[str, Any]) -> Inputs | None:
    """What a stage reads at this moment; None for one that dvc.yaml does not have.

    Raises:
        UserError: a file was edited while the stage was starting, or vanished while it was read.
    """
    definition = read_yaml(DVC_YAML)["stages"].get(name) if DVC_YAML.is_file() else None
    if definition is None:
        return None
    item = {key: str(value) for key, value in item.items()}
    deps, keys = (_entries(definition, kind, item) for kind in ("deps", "params"))
    try:
        paths = [file for dep in deps for file in digests.files_of(Path(dep))]
        identities = {path: digests.identity(path) for path in paths}
        _check_start(identities)
        found = digests.digests(identities)
        return Inputs(
            stage=name + ("@" + "-".join(item.values()) if item else ""),
            params=_params(keys),
            deps={dep: digests.known_digest(Path(dep), found) for dep in deps},
            files={path.as_posix(): Content(found[path], identities[path]) for path in identities},
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} was removed while it was read: run the same command again."
        ) from None


def _check_start(identities: dict[Path, list[int]]) -> None:
    """Raise a UserError if code was edited after this process began to read it: it may run by either version."""
    for path, (*_, changed) in identities.items():
        if path.suffix == ".py" and workflow.BEGAN <= changed / 1e9 <= time.time():
            raise UserError(f"{path} was edited while this stage was starting: run the same command again.")


def _entries(definition: dict, kind: str, item: dict[str, str]) -> list[str]:
    return [
        REFERENCE.sub(lambda match: item.get(match[1], match[0]), entry).rstrip("/")
        for entry in definition.get(kind, [])
    ]


def _params(keys: list[str], file: Path = PARAMS) -> dict[str, Any]:
    """These sections of a params file as JSON has them, by their dotted keys."""
    content = read_yaml(file) if keys and file.is_file() else {}
    return {key: plain(value_at(content, key)) for key in keys}


def value_at(content: Any, key: str) -> Any:
    """A value by its dotted key; None where there is none."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def plain(value: Any) -> Any:
    """A value as it comes back from JSON, so that what was written and what was read compare."""
    return json.loads(json.dumps(value, default=str))


def record_in(result: Path) -> dict[str, Any]:
    """What a result says that its stage read; empty where it says nothing of it."""
    try:
        content = read_json(result)
    except ValueError:
        return {}
    return content.get("inputs", {}) if isinstance(content, dict) else {}


def contradictions(
    recorded: dict[str, Any], stage: dict[str, Any], source: str = "dvc.lock"
) -> Iterator[str]:
    """In what a result's own record of what was read differs from its stage's entry in dvc.lock.

    Args:
        recorded: as `recorded` gave it; empty of a result that has none.
        stage: the entry, or another mapping of its form.
        source: what the entry is from, for the sentence.
    """
    for key, value in recorded.get("params", {}).items():
        expected = _locked_value(stage.get("params", {}).get("params.yaml", {}), key)
        for path, ours, theirs in differences(value, plain(expected), key) if expected is not None else ():
            yield f"{path} {shown(ours)}, where {source} has {shown(theirs)}"
    locked = {dep["path"]: dep.get("md5") for dep in stage.get("deps", [])}
    for path, digest in recorded.get("deps", {}).items():
        if path in locked and locked[path] != digest:
            yield f"another {path} than {source} has"


def _locked_value(params: dict[str, Any], key: str) -> Any:
    """A value of dvc.lock, where dotted keys stand on one level, or of params.yaml."""
    return params[key] if key in params else value_at(params, key)


def known_digests() -> dict[str, str]:
    """The md5 of each file that the stage that runs has read; empty outside of one."""
    inputs = _current()
    return {path: content.md5 for path, content in inputs.files.items()} if inputs else {}
