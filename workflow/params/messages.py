"""One sentence for each error of validation: the key, its value and what is allowed."""

import json
from itertools import islice
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from workflow.params.sources import KINDS_OF_COLUMNS
from workflow.runtime.errors import suggestion


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return one sentence for the first of pydantic's errors: the key, its value and what is allowed.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        prefix: the key under which the model's own keys stand.
    """
    errors = error.errors(include_url=False)
    # Of a word or a list of words, what is wrong with the list says more than that it is not the word.
    listed = [each for each in errors if any(str(part).startswith("list[") for part in each["loc"])]
    first = listed[0] if listed and _is_of_a_choice(errors[0]) else errors[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "literal["))]
    # A discriminated union puts the tag of what was chosen into the path; the user did not.
    if len(path) > 1 and path[0] in ("model", "dataset") and path[1] in ("hub", "wheel", "file", "random"):
        del path[1]
    columns = KINDS_OF_COLUMNS[path.pop(2)] if path[:2] == ["dataset", "columns"] and len(path) > 2 else None
    key = ".".join([*([prefix] if prefix else []), *path])
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            known = columns.model_fields if columns else _known_keys(path[:-1], model)
            sentence = (
                f"{key} is not a known key; known here are {', '.join(known)}{suggestion(path[-1], known)}"
            )
        case "missing":
            sentence = f"{key} is missing"
        case "value_error":
            text = str(first["ctx"]["error"])
            sentence = (
                f"{key}.{text}"
                if key and not text.startswith(("experiment.", "variants.", "comparison.", "evaluation."))
                else text
            )
        case "union_tag_invalid" | "union_tag_not_found":
            tag = value.get("source", "nothing") if isinstance(value, dict) else value
            allowed = first["ctx"].get("expected_tags", "'hub', 'wheel', 'file', 'random'").replace("'", "")
            sentence = f"{key}.source is {tag}; allowed is one of {allowed}"
        case _:
            allowed = first["msg"][0].lower() + first["msg"][1:]
            sentence = f"{key} is {shortened(value)}: {allowed}"
    more = len(errors) - 1
    return sentence + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _is_of_a_choice(error: dict) -> bool:
    return any(str(part).startswith("literal[") for part in error["loc"])


def shortened(value: Any) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(_pruned(value), default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _pruned(value: Any, depth: int = 3) -> Any:
    """The beginning of a value: with aliases in YAML, the whole of it may be endless."""
    match value:
        case dict() | list() if not depth:
            return "..."
        case dict():
            return {str(key)[:60]: _pruned(inner, depth - 1) for key, inner in islice(value.items(), 9)}
        case list():
            return [_pruned(inner, depth - 1) for inner in value[:9]]
        case str():
            return value[:80]
        case int() if abs(value) >= 10**60:
            return "a number of very many digits"
    return value


def _known_keys(path: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that the section of `root` at `path` allows."""
    models = [root]
    for part in path:
        # A part that is no field is the key of a mapping, whose values `models` are already.
        models = [
            inner
            for model in models
            for inner in (
                _models(model.model_fields[part].annotation) if part in model.model_fields else [model]
            )
        ]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, within unions and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
