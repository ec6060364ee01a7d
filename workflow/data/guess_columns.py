"""Guess which column of a table is the instruction, the context, the response and the category, by its name."""

from collections.abc import Sequence
from pathlib import Path

from workflow.data import tables
from workflow.runtime.errors import UserError, first_of

# Names that published data use, the likeliest first; compared without case, spaces, dashes and underscores.
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
NAMES = {
    "instruction": ("instruction", "prompt", "question", "query", "task", "problem", "user", "human", "input"),
    "response": ("response", "output", "answer", "completion", "reference", "target", "solution", "assistant", "gpt"),
    "context": ("context", "input", "passage", "document", "background"),
    "category": ("category", "topic", "tasktype", "type", "subject", "domain", "source"),
}  # fmt: skip
FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def names_in(path: Path, form: str) -> list[str]:
    """Return the columns of a table: those of its first row.

    Args:
        form: jsonl, csv or parquet.

    Raises:
        UserError: the file does not fit its format, or has no rows.
    """
    if form == "parquet":
        return tables.parquet_names(path)
    rows = tables.read_csv(path) if form == "csv" else tables.read_jsonl(path)
    if not rows:
        raise UserError(f"{path.name} has no rows.")
    return list(rows[0][1])


def guess_columns(names: Sequence[str]) -> dict[str, str | None]:
    """Return `dataset.columns` for a table: of conversations if a column is called so, else of instructions.

    Args:
        names: of the table's columns.

    Raises:
        UserError: no column is called as an instruction or a response is.
    """
    chat = _first(MESSAGES, names, ())
    if chat is not None:
        return {"messages": chat, "category": _first(NAMES["category"], names, (chat,))}
    columns: dict[str, str | None] = {}
    for key, known in NAMES.items():
        columns[key] = _first(known, names, tuple(filter(None, columns.values())))
    for key in ("instruction", "response"):
        if columns[key] is None:
            raise UserError(
                f"no column is called as {'an' if key == 'instruction' else 'a'} {key} is "
                f"({first_of(NAMES[key])}); there are {first_of(list(names))}: say which with "
                "COLUMNS_ARE=instruction=NAME,response=NAME."
            )
    return {key: columns[key] for key in ("instruction", "context", "response", "category")}


def named_columns(text: str, names: Sequence[str]) -> dict[str, str | None]:
    """Return `dataset.columns` as a user gives it: `instruction=question,response=answer`.

    Raises:
        UserError: a part is not of that form, or names no column.
    """
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    keys = (
        ("messages", "category")
        if "messages" in pairs
        else ("instruction", "context", "response", "category")
    )
    for key, name in pairs.items():
        if key not in keys:
            raise UserError(f"{key} is not one of {', '.join(keys)}.")
        if name not in names:
            raise UserError(f"{key} is to be the column {name}, and there are {first_of(list(names))}.")
    return {key: pairs.get(key) for key in keys}


def _first(known: Sequence[str], names: Sequence[str], taken: Sequence[str]) -> str | None:
    """Return the column with the likeliest of these names that is not taken yet; None if there is none."""
    plain = {
        name.lower().replace("_", "").replace("-", "").replace(" ", ""): name
        for name in names
        if name not in taken
    }
    return next((plain[name] for name in known if name in plain), None)
