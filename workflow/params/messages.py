"""One sentence for each error of validation: the key, its value and what is allowed."""

import json
from itertools import islice
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from workflow.params.problems import Problems
from workflow.params.sources import KINDS_OF_COLUMNS
from workflow.params.values import RATE_KINDS
from workflow.runtime.errors import suggestion

UNION_OF_SOURCES = ("union_tag_invalid", "union_tag_not_found")
MOST_LISTED = 12  # keys, beside the one that was probably meant
# Sections whose own sentences begin with the section's name.
SECTIONS = ("experiment.", "variants.", "comparison.", "evaluation.")


def describe(errors: list[ErrorDetails], model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return a sentence for each of pydantic's errors, without its full stop: the key, its value and what is allowed.

    Args:
        errors: what pydantic found.
        model: the model that was validated.
        prefix: the key under which the model's own keys stand.
    """
    return [sentence for each in _one_for_a_choice(errors) for sentence in sentences(each, model, prefix)]


def _one_for_a_choice(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors, where a value may be a word or a list of words, with those of the list alone.

    What is wrong with a list says more than that it is not the word.
    """
    chosen = []
    for error in errors:
        at = next((n for n, part in enumerate(error["loc"]) if _is_alternative(part)), None)
        if at is None:
            chosen.append(error)
        elif not _is_of_a_word(error):
            word = next(
                (e["msg"] for e in errors if e["loc"][:at] == error["loc"][:at] and _is_of_a_word(e)), ""
            )
            is_no_list = error["type"] == "list_type" and word
            chosen.append(error | {"msg": f"{word} or a list"} if is_no_list else error)
    return chosen


def _is_alternative(part: object) -> bool:
    return str(part).startswith(("list[", "literal["))


def _is_of_a_word(error: ErrorDetails) -> bool:
    return any(str(part).startswith("literal[") for part in error["loc"])


def path_of(error: ErrorDetails) -> list[str | int]:
    """Return where in the params an error is, without what pydantic adds for its unions."""
    path = [part for part in error["loc"] if not _is_alternative(part) and part not in RATE_KINDS]
    # A discriminated union puts the tag of what was chosen into the path; the user did not.
    if len(path) > 1 and path[0] in ("model", "dataset") and path[1] in ("hub", "wheel", "file", "random"):
        del path[1]
    if path[:2] == ["dataset", "columns"] and len(path) > 2:
        del path[2]
    return path


def sentences(error: ErrorDetails, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return what one of pydantic's errors says: one sentence, or more if a check of ours found more."""
    path = [str(part) for part in path_of(error)]
    key = ".".join([*([prefix] if prefix else []), *path])
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            return [_unknown_key(error, key, path, model)]
        case "missing":
            return [f"{key} is missing"]
        case "value_error":
            reason = error["ctx"]["error"]
            texts = reason.sentences if isinstance(reason, Problems) else [str(reason)]
            return [text if not key or text.startswith(SECTIONS) else f"{key}.{text}" for text in texts]
        case kind if kind in UNION_OF_SOURCES:
            tag = value.get("source", "nothing") if isinstance(value, dict) else shortened(value)
            allowed = error["ctx"].get("expected_tags", "'hub', 'wheel', 'file', 'random'").replace("'", "")
            return [f"{key}.source is {tag}; allowed is one of {allowed}"]
    allowed = error["msg"][0].lower() + error["msg"][1:]
    return [f"{key} is {shortened(value)}: {allowed}"]


def _unknown_key(error: ErrorDetails, key: str, path: list[str], model: type[BaseModel]) -> str:
    """The sentence of a key that its section does not have, with the key or the place that was probably meant."""
    models = _models_at(path[:-1], model, error["loc"])
    known = list(dict.fromkeys(field for each in models for field in each.model_fields))
    deeper = {
        f"{field}.{path[-1]}"
        for each in models
        for field, about in each.model_fields.items()
        if any(path[-1] in inner.model_fields for inner in _models(about.annotation))
    }
    if (near := suggestion(path[-1], known)) and len(known) > MOST_LISTED:
        return f"{key} is not a key; {near.strip(' ()')}"
    hint = near or (f" (did you mean {deeper.pop()}?)" if len(deeper) == 1 else "")
    return f"{key} is not a known key; known here are {', '.join(known)}{hint}"


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


def _models_at(path: list[str], root: type[BaseModel], location: tuple) -> list[type[BaseModel]]:
    """The models that the section of `root` at `path` may be; `location` has pydantic's tags of what it is."""
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
    if columns := [KINDS_OF_COLUMNS[part] for part in location if part in KINDS_OF_COLUMNS]:
        return columns
    return [model for model in models if _source(model) in location] or models


def _source(model: type[BaseModel]) -> str:
    """The tag of a model of `model` or `dataset` in params; empty for any other."""
    source = model.model_fields.get("source")
    return get_args(source.annotation)[0] if source else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, within unions and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
