"""Edits of the content of params.yaml, which tests apply to a preset."""


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
