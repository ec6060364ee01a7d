"""Edits of the content of params.yaml, which tests apply to a preset."""

from workflow.params.training import TrainingStep


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


def set_training(content: dict, **changes) -> None:
    """Change settings of a training, each in the section that has it."""
    for key, value in changes.items():
        content["training"]["step" if key in TrainingStep.model_fields else "schedule"][key] = value
