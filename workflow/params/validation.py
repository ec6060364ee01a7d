"""All problems of a params file at once: misspelled keys first, then what is wrong below them."""

import copy
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from workflow.params import checks, messages
from workflow.params.model import Params
from workflow.params.values import Strict

SOURCE = "source"  # the key that says which keys `model` and `dataset` have


def problems_of(content: dict[str, Any]) -> list[str]:
    """Return a sentence for each problem of a file's content, without its full stop; none if it is sound.

    A misspelled key is read as the one that it stands for: its value is checked too, and the key is not called missing
    as well. Any other unknown key is left out.
    """
    content = copy.deepcopy(content)
    sentences: list[str] = []
    while True:
        try:
            Params.model_validate(content)
            return sentences
        except ValidationError as error:
            errors = error.errors(include_url=False)
        problems_of_keys = _mend_keys(content, errors)
        if not problems_of_keys:
            return list(dict.fromkeys([*sentences, *_problems_of_values(content, errors)]))
        sentences += problems_of_keys


def _mend_keys(content: dict[str, Any], errors: list[ErrorDetails]) -> list[str]:
    """Rename or remove each unknown key within `content`; return a sentence for each."""
    sentences = []
    for error in errors:
        place = messages.path_of(error)
        if error["type"] == "union_tag_not_found" and isinstance(error["input"], dict):
            key, absent = _near(SOURCE, error["input"]), {SOURCE}
        elif error["type"] == "extra_forbidden":
            key = place.pop()
            missing = [messages.path_of(other) for other in errors if other["type"] == "missing"]
            absent = {path[-1] for path in missing if path[:-1] == place}
        else:
            continue
        section = _section(content, place)
        if key not in section:  # mended already, by an alias
            continue
        value, meant = section.pop(key), _near(str(key), absent - section.keys())
        if meant is None:
            sentences += messages.sentences(error, Params)
        else:
            section[meant] = value
            sentences.append(f"{'.'.join(map(str, [*place, key]))} is not a key; did you mean {meant}?")
    return sentences


def _near(word: str, words: Iterable[object]) -> str | None:
    """The word that is most like another; None if none is."""
    return next(iter(get_close_matches(word, list(map(str, words)), n=1)), None)


def _section(content: dict[str, Any], place: list[str | int]) -> dict[str, Any]:
    section: Any = content
    for part in place:
        section = section[part]
    return section


def _problems_of_values(content: dict[str, Any], errors: list[ErrorDetails]) -> list[str]:
    """The problems of a content without unknown keys; what is sound of it is also checked as a whole."""
    sentences = messages.describe(errors, Params)
    damaged = {tuple(messages.path_of(error)) for error in errors}
    if () in damaged:  # then all keys are sound, and these are the checks of the whole
        return sentences
    return [*sentences, *checks.check(_sound_part(Params, content, damaged), damaged)]


def _sound_part(model: type[BaseModel], content: dict[str, Any], damaged: set[tuple]) -> Any:
    """A model with its undamaged fields alone; of a damaged section, with its undamaged keys."""
    fields = {}
    for name, field in model.model_fields.items():
        inside = {path[1:] for path in damaged if path[:1] == (name,)}
        if not inside:
            fields[name] = TypeAdapter(field.rebuild_annotation()).validate_python(content[name])
        elif () not in inside and isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
            fields[name] = _sound_part(field.annotation, content[name], inside)
    return model.model_construct(**fields)
