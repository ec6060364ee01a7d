"""dvc.lock as data: what each stage was run with, and the md5 of what it read and wrote.

Every part of the project that compares something with dvc.lock reads it here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from workflow.runtime.errors import UserError
from workflow.runtime.paths import DVC_LOCK, PARAMS


@dataclass(frozen=True)
class LockedStage:
    """A stage's entry in dvc.lock.

    Attributes:
        command: what was run.
        deps: the md5 of each file and folder that it read, by path; None where there was nothing.
        params: the values that it was run with, by their dotted keys in params.yaml.
        outs: the md5 of each file and folder that it wrote, by path.
    """

    command: str
    deps: dict[str, str | None]
    params: dict[str, Any]
    outs: dict[str, str | None]


@dataclass(frozen=True)
class Difference:
    """Something that is not as dvc.lock records it.

    Attributes:
        stage: in whose entry it stands.
        kind: whether the stage wrote it, read it, or was run with it.
        name: a path, or a param's dotted key.
        missing: whether there is no such file or folder.
    """

    stage: str
    kind: Literal["out", "dep", "param"]
    name: str
    missing: bool = False


def read(path: Path = DVC_LOCK) -> dict[str, LockedStage]:
    """The stages of a dvc.lock by name; none where there is no such file.

    Raises:
        UserError: the file is not sound.
    """
    if not path.is_file():
        return {}
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise _unsound(error) from None


def parse(text: str) -> dict[str, LockedStage]:
    """The stages of a dvc.lock's text by name.

    Raises:
        UserError: the text is not sound.
    """
    try:
        # A study's dvc.lock has ten thousand lines, for which a reader in pure Python takes ten times as long.
        content = yaml.load(text, Loader=_SafeLoader) or {}
        return {name: _stage(entry) for name, entry in (content.get("stages") or {}).items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsound(error) from None


def differences(
    stages: Mapping[str, LockedStage], params: dict[str, Any], digest_of: Callable[[str], str | None]
) -> Iterator[Difference]:
    """Every output, dependency and param that is not as the entries record it.

    Args:
        stages: the entries, by stage.
        params: the content of params.yaml.
        digest_of: returns the md5 of what lies at a path; None where there is nothing.
    """
    for name, stage in stages.items():
        for kind, entries in (("out", stage.outs), ("dep", stage.deps)):
            for path, md5 in entries.items():
                digest = digest_of(path)
                if digest is None or digest != md5:
                    yield Difference(name, kind, path, missing=digest is None)
        for key, value in stage.params.items():
            if value_at(params, key) != value:
                yield Difference(name, "param", key)


def value_at(content: Any, key: str) -> Any:
    """A value by its dotted key; None where there is none."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _stage(entry: dict[str, Any]) -> LockedStage:
    return LockedStage(
        command=entry["cmd"],
        deps=_digests(entry.get("deps", [])),
        params=entry.get("params", {}).get(PARAMS.name, {}),
        outs=_digests(entry.get("outs", [])),
    )


def _digests(entries: list[dict[str, Any]]) -> dict[str, str | None]:
    return {
        entry["path"]: entry.get("md5") if entry.get("hash", "md5") == "md5" else None for entry in entries
    }


def _unsound(error: Exception) -> UserError:
    return UserError(f"{DVC_LOCK} is not sound YAML: {' '.join(str(error).split())}")


class _SafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads YAML 1.2, which DVC writes. PyYAML's own 1.1 takes 1e-05 for a text, and `on` for a truth value."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's interface)
        first: [
            (tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("bool", "int", "float")
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):  # fmt: skip
    _SafeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first)
    )
