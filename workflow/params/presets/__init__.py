"""Presets: the default params, and what differs from them, each in a file of this folder.

In: a preset's name. Out: the text of the complete params file, with the comments of both.
"""

from pathlib import Path

from workflow.params import commented
from workflow.runtime.errors import UserError, suggestion

# The default as it was committed: params.yaml itself is the user's to edit.
DEFAULT = Path(__file__).parents[1] / "default.yaml"
FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all presets; `default` is the one that changes nothing."""
    return [DEFAULT.stem, *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


def complete_text(name: str) -> str:
    """Return the complete params file of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if name not in names():
        raise UserError(f"{name} is not a preset; known are {', '.join(names())}{suggestion(name, names())}.")
    text = DEFAULT.read_text(encoding="utf-8")
    if name == DEFAULT.stem:
        return text
    default_head, default = commented.split_head(text)
    head, changes = commented.split_head((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    # The first line of a preset says how it is merged; the second of the default, what the default is.
    merged_head = [default_head[0], *head[1:], *default_head[2:]]
    return commented.render(merged_head, commented.merge(default, changes))


def with_section(text: str, section: str, *, of: str) -> str:
    """Return a complete params file with one section, and its comments, of another."""
    head, entries = commented.split_head(text)
    other = next(entry for entry in commented.split_head(of)[1] if entry.key == section)
    return commented.render(head, [other if entry.key == section else entry for entry in entries])
