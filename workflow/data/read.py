"""Read a dataset: JSON lines, CSV, parquet, conversations, or the YAML of chatterbot-corpus."""

import math
from decimal import Decimal
from pathlib import Path

from workflow import params
from workflow.data import conversations, tables
from workflow.data.rows import Instruction
from workflow.data.texts import check_text, says_something
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_yaml
from workflow.runtime.stage import say


def read(path: Path, dataset: params.Dataset) -> list[Instruction]:
    """Read the rows of a dataset in the order of its file (in the order of file names, for a folder).

    Raises:
        UserError: the file does not fit its format, a column is missing, or a row has no instruction, no
            response, or a text that is not valid. The message names the file and the row.
    """
    if dataset.format == "chatterbot":
        return _instructions(_read_chatterbot(path), path)
    columns = dataset.columns.model_dump()
    is_chat = isinstance(dataset.columns, params.ChatColumns)
    table = tables.read(
        path, dataset.format, columns, optional=conversations.OF_THE_PROMPT if is_chat else ()
    )
    rows = [(f"{path.name} {where}", row) for where, row in table]
    if is_chat:
        rows = [(where, _conversation(row, columns, where)) for where, row in rows]
    return _instructions(rows, path)


def _conversation(row: dict, columns: dict[str, str | None], where: str) -> dict:
    """Return a row of conversations in the form of one with an instruction and a response.

    Args:
        row: its messages (in a CSV, JSON text), its category, and other cells that could belong in a prompt.
        columns: the columns that `dataset.columns` names.
    """
    conversations.check_row(row, set(columns.values()), where)
    messages = row["messages"]
    if isinstance(messages, str):
        messages = tables.parsed(messages, f"{where} has messages that are text and not JSON")
    return conversations.last_turn(messages, where) | {"category": row["category"]}


def _read_chatterbot(path: Path) -> tables.Rows:
    """Read the YAML of chatterbot-corpus: the first turn is the instruction, the second is the response."""
    files = sorted(path.glob("*.yml")) if path.is_dir() else [path]
    rows = []
    for file in files:
        corpus = read_yaml(file)
        dialogs = corpus.get("conversations") if isinstance(corpus, dict) else None
        if not isinstance(dialogs, list):
            raise UserError(f"{file.name} has no list of conversations, as chatterbot-corpus' files have.")
        for number, turns in enumerate(dialogs, start=1):
            where = f"{file.name} conversation {number}"
            if isinstance(turns, str) and turns.count(" - ") == 1:
                # One conversation of the corpus lacks its first dash, so YAML reads both lines as one text. Treated
                # as a list of turns, that text would give its first two letters.
                turns = [turn.strip().strip("'\"") for turn in turns.split(" - ")]
                say(f"  {where} lacks the dash before its first turn, and is read as if it had it")
            if not isinstance(turns, list) or not turns:
                raise UserError(f"{where} is not a list of turns.")
            row = {
                "instruction": turns[0],
                "context": "",
                "response": turns[1] if len(turns) > 1 else None,
                "category": file.stem,
            }
            rows.append((where, row))
    return rows


def _instructions(rows: tables.Rows, path: Path) -> list[Instruction]:
    """Check rows and number them.

    Raises:
        UserError: there is no row, or a text of one is missing or not valid.
    """
    instructions = []
    for index, (where, cells) in enumerate(rows):
        row = cells | {"category": _category(cells["category"])}
        _check_texts(row, where)
        instructions.append(
            Instruction(
                id=index,
                instruction=row["instruction"].strip(),
                context=(row["context"] or "").strip(),
                response=row["response"].strip(),
                category=row["category"],
                earlier=row.get("earlier", []),
                not_learned=row.get("not_learned", []),
            )
        )
    if not instructions:
        raise UserError(f"{path.name} has no rows.")
    return instructions


def _check_texts(row: dict, where: str) -> None:
    """Raise a UserError if a text of a row is missing or not valid."""
    for key in ("instruction", "context", "response", "category"):
        text = row[key]
        required = key in ("instruction", "response")
        noun = f"an {key}" if key == "instruction" else f"a {key}"
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where} has {noun} that is not text but {tables.type_name(text)}.")
        if required and (text is None or not says_something(text)):
            raise UserError(f"{where} has no {key}; every row needs one.")
        check_text(text or "", f"{where} has {noun}")


def _category(label: object) -> object:
    """Return a numeric label as text, without the `.0` of a whole number; NaN, pandas' missing number, is None."""
    match label:
        case bool():
            return str(label).lower()
        case int():
            return str(label)
        case float() | Decimal():
            if math.isnan(label):
                return None
            return str(int(label)) if label == label // 1 else str(label)
    return label
