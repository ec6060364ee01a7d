"""Read users' tables exactly as written: JSON lines, CSV and parquet.

The dataset and the files of evaluation tasks share these readers. Types are never guessed: a CSV holds only text, a
JSON value keeps its type, and only the named columns of a parquet file are read.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow.runtime.errors import UserError
from workflow.runtime.files import not_utf8

if TYPE_CHECKING:
    import pyarrow

Rows = list[tuple[str, dict]]  # where a row stands in its file, and its cells by column

LONGEST_CELL = 2**31 - 1  # characters; a long conversation exceeds the 128 KiB that csv allows by default


def read(path: Path, form: str, columns: Mapping[str, str | None], *, optional: Iterable[str] = ()) -> Rows:
    """Read the columns that `dataset.columns` names, and return them under our names.

    Args:
        form: jsonl, csv or parquet.
        columns: from our name of each column to the file's; None for a column that the file does not have.
        optional: further columns, which are read under their own names if the file has them.

    Raises:
        UserError: the file does not fit its format, or a column is missing or cannot be read.
    """
    if form == "parquet":
        present = set(parquet_names(path)).difference(columns.values())
        return _read_parquet(path, {**columns, **{name: name for name in optional if name in present}})
    rows = read_csv(path) if form == "csv" else read_jsonl(path)
    further = set(optional).difference(columns.values())
    return [
        (where, _pick(row, columns, path, where) | {name: row[name] for name in further.intersection(row)})
        for where, row in rows
    ]


def _pick(row: dict, columns: Mapping[str, str | None], path: Path, where: str) -> dict:
    for ours, theirs in columns.items():
        if theirs is not None and theirs not in row:
            raise UserError(
                f"{path.name} {where} has no column {theirs}, which dataset.columns.{ours} names; "
                f"it has {', '.join(map(str, row))}."
            )
    return {ours: None if theirs is None else row[theirs] for ours, theirs in columns.items()}


def read_jsonl(path: Path) -> Rows:
    """Read JSON lines; blank lines are skipped.

    Raises:
        UserError: the file is not UTF-8, or a line is not a JSON object that has each key once.
    """
    rows: Rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if not rows and line.lstrip().startswith("["):
                    raise UserError(
                        f"{path.name} line {number} begins a JSON array, and format jsonl is one object a line; "
                        "`jq -c '.[]'` writes it so."
                    )
                row = parsed(line, f"{path.name} line {number} is not JSON")
                if not isinstance(row, dict):
                    raise UserError(f"{path.name} line {number} is not a JSON object.")
                rows.append((f"line {number}", row))
    except UnicodeDecodeError:
        raise _no_utf8(path) from None
    return rows


def read_json(path: Path) -> Rows:
    """Read a .json file: an array of objects, or one object a line.

    Raises:
        UserError: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _no_utf8(path) from None
    if not text.lstrip().startswith("["):
        return read_jsonl(path)
    rows = parsed(text, f"{path.name} is not JSON")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path.name} item {number} is not a JSON object.")
    return [(f"item {number}", row) for number, row in enumerate(rows, start=1)]


def parsed(text: str, refused: str) -> Any:
    """Parse a JSON text.

    Raises:
        UserError: it is not valid, or has a key twice; the message begins with `refused`.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise UserError(f"{refused}: {reason} (character {error.pos + 1}).") from None
    except RecursionError:
        raise UserError(f"{refused}: it is nested too deeply.") from None
    except ValueError as error:  # a number of thousands of digits, or a key twice
        raise UserError(f"{refused}: {str(error).split(';')[0]}.") from None


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)} twice")
    return content


def read_csv(path: Path) -> Rows:
    """Read a CSV with a header; every cell is text, exactly as written.

    Raises:
        UserError: the file is not UTF-8 or not such a CSV.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            try:
                names = next(lines, [])
                table = [cells for cells in lines if cells]
            except csv.Error as error:
                raise UserError(f"{path.name} is not a CSV from line {lines.line_num} on: {error}.") from None
    except UnicodeDecodeError:
        raise _no_utf8(path) from None
    _check_names(path, names)
    for number, cells in enumerate(table, start=1):
        if len(cells) != len(names):
            raise UserError(
                f"{path.name} row {number} has {len(cells)} cells, and the line of names {len(names)}; "
                "a text with a comma or a line break must stand in double quotes."
            )
    return [
        (f"row {number}", dict(zip(names, cells, strict=True))) for number, cells in enumerate(table, start=1)
    ]


def _no_utf8(path: Path) -> UserError:
    return UserError(f"{path.name} is not UTF-8 ({not_utf8(path)}).")


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UserError(f"{path.name} has two columns {twice[0]}.")


def _read_parquet(path: Path, columns: Mapping[str, str | None]) -> Rows:
    """Read only the named columns: others may hold values that Python cannot represent."""
    names = parquet_names(path)
    _pick(dict.fromkeys(names), columns, path, "row 1")  # every row has the same columns
    _check_names(path, [name for name in names if name in columns.values()])
    table = parquet_table(path, list(dict.fromkeys(name for name in columns.values() if name)))
    cells = {name: _cells(table, name, path) for name in table.column_names}
    return [
        (f"row {place + 1}", {ours: cells[name][place] if name else None for ours, name in columns.items()})
        for place in range(table.num_rows)
    ]


def parquet_names(path: Path) -> list[str]:
    """Return the names of the columns of a parquet file, in the file's order.

    Raises:
        UserError: the file cannot be read as parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from None


def parquet_table(path: Path, names: list[str]) -> "pyarrow.Table":
    """Read these columns of a parquet file.

    Raises:
        UserError: the file, or one of these columns, cannot be read as parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(columns=names).select(names)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise _no_parquet(path, error) from None


def _no_parquet(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(f"{path.name} cannot be read as parquet: {reason}.")


def _cells(table: "pyarrow.Table", name: str, path: Path) -> list:
    """Return the values of a column; class labels of the datasets library are replaced by their names."""
    reason = unreadable(table[name])
    if reason:
        raise UserError(f"{path.name} {reason} in column {name}.")
    values = table[name].to_pylist()
    labels = _class_labels(table.schema.metadata, name)
    if labels is None:
        return values
    for number, value in enumerate(values, start=1):
        if value is not None and not -1 <= value < len(labels):
            raise UserError(
                f"{path.name} row {number} has the class {value} in column {name}, and the file names "
                f"{len(labels)} classes, counted from 0."
            )
    return [None if value in (None, -1) else labels[value] for value in values]  # -1: datasets' "no label"


def unreadable(column: "pyarrow.ChunkedArray") -> str | None:
    """Say where a column first holds a value that Python cannot represent, and why; None if there is none."""
    import pyarrow

    failures = (ArithmeticError, LookupError, ValueError, ImportError, pyarrow.ArrowException)
    try:
        column.to_pylist()
        return None
    except failures:
        pass
    for number, value in enumerate(column, start=1):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return f"row {number} has bytes that are not UTF-8"
        except failures as error:
            reason = str(error).splitlines()[0].strip("'\".") or type(error).__name__
            return f"row {number} has a value that cannot be read ({column.type}: {reason})"
    return f"has a value that cannot be read ({column.type})"


def _class_labels(metadata: dict | None, name: str) -> list[str] | None:
    """Return the names of class labels that the datasets library stored in the metadata."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][name]
        return list(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def as_column(values: list) -> "pyarrow.Array | tuple[int, str]":
    """Return JSON values as one typed column, or the place of the first that does not fit those before it, and why.

    An integer among decimal numbers is not converted: a prompt would say 1.0 where the file says 1.
    """
    import pyarrow

    kind = None
    for place, value in enumerate(values):
        if value is None:
            continue
        kind = kind or type(value)
        if type(value) is not kind:
            return place, f"{_precise_name(value)} where those before it have {_precise_name(kind())}"

    def fits(count: int) -> bool:
        try:
            pyarrow.array(values[:count])
        except (pyarrow.ArrowException, ArithmeticError, ValueError, TypeError):
            return False
        return True

    if fits(len(values)):
        return pyarrow.array(values)
    low, high = 0, len(values)  # the first `low` values fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, f"{_precise_name(values[low])} that does not fit those before it or 64 bits"


def _precise_name(value: object) -> str:
    match value:
        case int() if not isinstance(value, bool):
            return "a whole number"
        case float():
            return "a decimal number"
    return type_name(value)


def type_name(value: object) -> str:
    """Name the type of a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
        case bytes():
            return "bytes"
    return f"of type {type(value).__name__}"
