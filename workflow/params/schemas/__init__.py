"""The JSON schema of params.yaml, by which an editor completes, checks and explains it."""

from collections.abc import Iterator

from workflow.params import commented, presets
from workflow.params.model import Params

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict:
    """Return the JSON schema of a params file; a key's description is its comment in the default params.

    What no schema can say, `params.load` checks.
    """
    document = {"$schema": DIALECT, **Params.model_json_schema()}
    _, sections = commented.split_head(presets.DEFAULT.read_text(encoding="utf-8"))
    for path, comment in commented.comments(sections):
        for key_schema in _at(document, path):
            key_schema["description"] = comment
    return document


def _at(document: dict, path: tuple[str, ...]) -> Iterator[dict]:
    """Yield the schemas of a key: one for each section of a union that has it, and none for a user's own names."""
    schemas = [document]
    for key in path:
        mappings = [mapping for each in schemas for mapping in _mappings(document, each)]
        schemas = [mapping["properties"][key] for mapping in mappings if key in mapping["properties"]]
    yield from schemas


def _mappings(document: dict, key_schema: dict) -> Iterator[dict]:
    """Yield the schemas with properties that a schema is, refers to, or is a union of."""
    if "properties" in key_schema:
        yield key_schema
    if "$ref" in key_schema:
        yield from _mappings(document, document["$defs"][key_schema["$ref"].removeprefix("#/$defs/")])
    for member in (*key_schema.get("oneOf", ()), *key_schema.get("anyOf", ())):
        yield from _mappings(document, member)
