"""The JSON schema of params.yaml, by which an editor completes, checks and explains it."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from workflow.params import commented, presets
from workflow.params.model import Params

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict:
    """Return the JSON schema of a params file; a key's description is its comment in the default params.

    A key below one that has such a comment, as those of a variant or a task are, has what the comment says of it. What no schema can say, `params.load` checks.
    """
    document = {"$schema": DIALECT, **Params.model_json_schema()}
    _, sections = commented.split_head(presets.DEFAULT.read_text(encoding="utf-8"))
    for path, comment in commented.comments(sections):
        for key_schema in _at(document, path):
            key_schema["description"] = comment
    for section in document["properties"].values():
        _describe_below(document, section, section.get("description", ""))
        if "$ref" in section:
            section.setdefault("description", _definition(document, section)["description"])
    return document


def _at(document: dict, path: tuple[str, ...]) -> Iterator[dict]:
    """Yield the schemas of a key: one for each section of a union that has it, and none for a user's own names."""
    schemas = [document]
    for key in path:
        mappings = [mapping for each in schemas for mapping in _mappings(document, each)]
        schemas = [mapping["properties"][key] for mapping in mappings if key in mapping["properties"]]
    yield from schemas


def _describe_below(document: dict, key_schema: dict, comment: str) -> None:
    """Give the keys below a key, which have no description, what the comment of that key says of them."""
    for mapping in _values(document, key_schema):
        properties = mapping["properties"]
        text = properties.get("source", {}).get("description", comment)
        for key, inner in properties.items():
            if text:
                inner.setdefault("description", _part(text, key, properties))
            _describe_below(document, inner, inner.get("description", ""))


def _part(comment: str, key: str, keys: Iterable[str]) -> str:
    """What a comment says of one of the keys that it explains as `key: text`; all of it if it names the key otherwise."""
    begins = sorted(match.start() for match in re.finditer(rf"(^|(?<=\. ))({'|'.join(keys)}): ", comment))
    for start, end in pairwise([*begins, len(comment)]):
        if comment.startswith(f"{key}: ", start):
            return comment[start + len(key) + 2 : end].strip()
    return comment


def _values(document: dict, key_schema: dict) -> Iterator[dict]:
    """Yield the schemas with properties of a key, or of each value of a mapping with names of the user's own."""
    yield from _mappings(document, key_schema)
    for each in (key_schema, *key_schema.get("anyOf", ())):
        for value in (each.get("additionalProperties"), *each.get("patternProperties", {}).values()):
            if isinstance(value, dict):
                yield from _mappings(document, value)


def _definition(document: dict, key_schema: dict) -> dict:
    return document["$defs"][key_schema["$ref"].removeprefix("#/$defs/")]


def _mappings(document: dict, key_schema: dict) -> Iterator[dict]:
    """Yield the schemas with properties that a schema is, refers to, or is a union of."""
    if "properties" in key_schema:
        yield key_schema
    if "$ref" in key_schema:
        yield from _mappings(document, _definition(document, key_schema))
    for member in (*key_schema.get("oneOf", ()), *key_schema.get("anyOf", ())):
        yield from _mappings(document, member)
