"""What a stage reads: recorded when it starts, compared with dvc.lock, and checked for edits when it ends.

DVC records params and dependencies after a stage has ended, so dvc.lock would list an edit made meanwhile beside the result
of what was there before. DVC also trusts its cache, so a damaged file would pass for a sound one. A stage therefore reads
a copy of params.yaml from its start, computes the md5 of every other file that dvc.yaml says it reads, refuses files that
differ from dvc.lock, and fails at its end if anything has changed, so that DVC records nothing.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

import workflow
from workflow.runtime import digests, dvc_yaml, outputs
from workflow.runtime.dvc_lock import value_at
from workflow.runtime.errors import UserError, first_of
from workflow.runtime.files import read_json, read_yaml, whole_file, write_json
from workflow.runtime.paths import INPUT_RECORDS, PARAMS

# The path of the record of what a stage reads, while it runs, for it and the processes that it starts.
VARIABLE = "WORKFLOW_INPUTS"


@dataclass(frozen=True)
class Content:
    """A file as it was read: its md5, and the identity that changes when it is written."""

    md5: str
    identity: list[int]


@dataclass(frozen=True)
class Inputs:
    """What a stage reads, by dvc.yaml.

    Attributes:
        stage: as DVC names it, train@lora_16bit-1.
        params: values by dotted keys of params.yaml; None for a missing key.
        deps: digests of the files and folders, in the form of dvc.lock; None for a missing one.
        files: every file of them.
    """

    stage: str
    params: dict[str, Any]
    deps: dict[str, str | None]
    files: dict[str, Content]


@contextmanager
def recording(name: str, item: dict[str, Any]) -> Iterator[None]:
    """Record what a stage reads; in the block `check` and `recorded` know it, and params are read from a copy.

    Args:
        name: the stage's name in dvc.yaml; a stage that is not there has no record.
        item: the values of its matrix by name.

    Raises:
        UserError: a file differs from dvc.lock, or is being edited; the sentence says how to restore it.
    """
    inputs = snapshot(name, item)
    if inputs is None:
        yield
        return
    outputs.check_read(inputs.deps, {Path(path): content.md5 for path, content in inputs.files.items()})
    record = (INPUT_RECORDS / f"{inputs.stage}.json").absolute()
    write_json(record, asdict(inputs))
    copy = _copy_of_params(record)
    copy.unlink(missing_ok=True)
    if PARAMS.is_file():
        with whole_file(copy) as partial:
            shutil.copyfile(PARAMS, partial)
        if _params(list(inputs.params), copy) != inputs.params:
            raise UserError(f"{PARAMS} was edited while this stage was starting: run the same command again.")
    os.environ[VARIABLE] = str(record)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def params_file(path: Path) -> Path:
    """Return where to read a params file: for params.yaml within a stage, the copy from the stage's start."""
    if path == PARAMS and VARIABLE in os.environ:
        copy = _copy_of_params(Path(os.environ[VARIABLE]))
        return copy if copy.is_file() else path
    return path


def _copy_of_params(record: Path) -> Path:
    return record.with_suffix(".params.yaml")


def recorded() -> dict[str, Any]:
    """Return what this stage read, for its result: params by key and digests of dependencies; empty outside a stage."""
    inputs = _current()
    return {"params": inputs.params, "deps": inputs.deps} if inputs else {}


def check() -> None:
    """Check that nothing that this stage reads has changed since it started; does nothing outside a stage.

    Raises:
        UserError: something has; the sentence names it.
    """
    before = _current()
    if before is None:
        return
    changes = [*_param_changes(before), *_file_changes(before)]
    if changes:
        raise UserError(
            "what this stage reads was edited while it ran, so nothing is recorded and the next run makes it again: "
            f"{first_of(changes, '; ')}."
        )


def _current() -> Inputs | None:
    if VARIABLE not in os.environ:
        return None
    return TypeAdapter(Inputs).validate_json(Path(os.environ[VARIABLE]).read_bytes())


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
            yield f"{path} in params.yaml from {quote(old)} to {quote(new)}"


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
    """Yield each difference of two sections of params: the dotted key and both values, None for a missing one."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from differences(before.get(name), after.get(name), f"{key}.{name}")
    elif before != after:
        yield key, before, after


def quote(value: Any) -> str:
    """Return a param's value for a sentence."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def snapshot(name: str, item: dict[str, Any]) -> Inputs | None:
    """Return what a stage reads at this moment; None for a stage that dvc.yaml does not have.

    Raises:
        UserError: a file was edited while the stage was starting, or vanished while it was read.
    """
    entries = dvc_yaml.entries_of(name, item)
    if entries is None:
        return None
    try:
        paths = [file for dep in entries.deps for file in digests.files_of(Path(dep))]
        identities = {path: digests.identity(path) for path in paths}
        _check_start(identities)
        md5s = digests.digests(identities)
        return Inputs(
            stage=entries.stage,
            params=_params(entries.params),
            deps={dep: digests.known_digest(Path(dep), md5s) for dep in entries.deps},
            files={path.as_posix(): Content(md5s[path], identities[path]) for path in identities},
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} was removed while it was read: run the same command again."
        ) from None


def _check_start(identities: dict[Path, list[int]]) -> None:
    """Check that no code was edited after this process began to import it: either version may be running.

    Raises:
        UserError: a file of code was.
    """
    for path, (*_, changed) in identities.items():
        if path.suffix == ".py" and workflow.BEGAN <= changed / 1e9 <= time.time():
            raise UserError(f"{path} was edited while this stage was starting: run the same command again.")


def _params(keys: list[str], file: Path = PARAMS) -> dict[str, Any]:
    """Return sections of a params file, as JSON holds them, by dotted key."""
    content = read_yaml(file) if keys and file.is_file() else {}
    return {key: plain(value_at(content, key)) for key in keys}


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON, so that it can be compared with one that was read."""
    return json.loads(json.dumps(value, default=str))


def record_in(result: Path) -> dict[str, Any]:
    """Return what a result says that its stage read; empty if it does not say."""
    try:
        content = read_json(result)
    except ValueError:
        return {}
    return content.get("inputs", {}) if isinstance(content, dict) else {}


def contradictions(
    recorded: dict[str, Any],
    *,
    params: dict[str, Any],
    deps: Mapping[str, str | None] = MappingProxyType({}),
    source: str = "dvc.lock",
) -> Iterator[str]:
    """Yield the differences between a result's record of what its stage read and another record.

    Args:
        recorded: the return value of `recorded`; empty for a result without a record.
        params: the other params, from dvc.lock or params.yaml.
        deps: the other digests, by path.
        source: where the other record is from, for the sentence.
    """
    for key, value in recorded.get("params", {}).items():
        expected = _locked_value(params, key)
        for path, ours, theirs in differences(value, plain(expected), key) if expected is not None else ():
            yield f"{path} {quote(ours)}, where {source} has {quote(theirs)}"
    for path, digest in recorded.get("deps", {}).items():
        if path in deps and deps[path] != digest:
            yield f"another {path} than {source} has"


def _locked_value(params: dict[str, Any], key: str) -> Any:
    """Return a value of dvc.lock, which has dotted keys on one level, or of params.yaml."""
    return params[key] if key in params else value_at(params, key)


def known_digests() -> dict[str, str]:
    """Return the md5 of each file that the running stage has read; empty outside a stage."""
    inputs = _current()
    return {path: content.md5 for path, content in inputs.files.items()} if inputs else {}
