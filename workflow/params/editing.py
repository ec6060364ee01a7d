"""Change one section of a params file, and leave every other character of it as it is.

The section keeps the comments of the keys that stay.
"""

import io
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.comments import CommentedMap

from workflow.params import commented
from workflow.runtime.errors import UserError


def with_section(text: str, name: str, content: Mapping[str, Any]) -> str:
    """Return a params file in which a section has this content in place of its own.

    Args:
        text: of the file.
        name: of the section.
        content: its keys; a mapping among the values is written on one line.

    Raises:
        UserError: the file has no such section, or is laid out in a way that this cannot edit.
    """
    change = _dumped(name, content).replace(f"{name}:", f"{name}: {commented.REPLACE}", 1)
    return _edited(text, name, change, dict(content))


def with_value(text: str, name: str, key: str, value: Any) -> str:
    """Return a params file in which one key of a section has another value.

    Raises:
        UserError: as for `with_section`.
    """
    section = _loaded(text).get(name) or {}
    return _edited(text, name, _dumped(name, {key: value}), section | {key: value})


def _edited(text: str, name: str, change: str, section: dict[str, Any]) -> str:
    """Return the text with a change, in the form of a preset, of one section.

    Args:
        section: what the section must then hold.
    """
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if re.match(rf"{name}:\s*(#.*)?$", line)), None)
    if start is None:
        raise UserError(
            f"params.yaml has no section {name} of its own lines: `make params` writes a complete file."
        )
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    before = commented.parse([line.rstrip("\r\n") for line in lines[start:end]])
    values = _loaded(text)[name] or {}
    # What keeps its value keeps its line, with the quotes and the comment that stand there.
    kept = {
        child.key: child for child in before[0].children() if values.get(child.key) == section.get(child.key)
    }
    (after,) = commented.parse(change.splitlines())
    children = [kept.get(child.key, child) for child in after.children()]
    after = replace(after, body=tuple(line for child in children for line in child.lines()))
    (merged,) = commented.merge(before, [after])
    edited = "".join([*lines[:start], *(f"{line}\n" for line in merged.lines()), *lines[end:]])
    with suppress(YAMLError):
        if _loaded(edited) == _loaded(text) | {name: section}:
            return edited
    raise UserError(
        f"section {name} of params.yaml is laid out in another way than workflow/params/default.yaml, so it was not "
        "edited: put the new values in by hand."
    )


def _dumped(name: str, content: Mapping[str, Any]) -> str:
    """Return a section as YAML; a mapping or list among its values stands on one line."""
    values = CommentedMap(content)
    for key, value in values.items():
        if isinstance(value, Mapping):
            values[key] = CommentedMap(value)
            values[key].fa.set_flow_style()
    yaml = YAML()
    yaml.width = 10_000
    yaml.representer.add_representer(
        type(None), lambda representer, value: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = io.StringIO()
    yaml.dump({name: values}, stream)
    return stream.getvalue()


def _loaded(text: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(text)
