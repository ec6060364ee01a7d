"""Edits of the content of params.yaml, which tests apply to a preset."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from workflow import params
from workflow.params.training import TrainingStep
from workflow.runtime.errors import UserError


def put(path: str, value):
    def change(changed: dict) -> None:
        *sections, key = path.split(".")
        for section in sections:
            changed = changed[section]
        changed[key] = value

    return change


def drop(path: str):
    def change(changed: dict) -> None:
        *sections, key = path.split(".")
        for section in sections:
            changed = changed[section]
        del changed[key]

    return change


def set_variants(content: dict, names: list[str]) -> None:
    """Run these variants alone, and measure what each costs."""
    content["experiment"]["variants"], content["benchmark"]["variants"] = names, list(names)


def error_of(path: Path, content: dict) -> str:
    """The text with which `load` refuses this content of a params file."""
    with path.open("w") as file:
        YAML().dump(content, file)
    with pytest.raises(UserError) as error:
        params.load(path)
    return str(error.value)


def set_training(content: dict, **changes) -> None:
    """Change settings of a training, each in the section that has it."""
    for key, value in changes.items():
        content["training"]["step" if key in TrainingStep.model_fields else "schedule"][key] = value
