"""Markdown as GitHub and the model hub render it: text that stays text, code spans, and tables."""

import re
from collections.abc import Iterable, Sequence


class Code(str):
    """A cell of a table that is shown as a code span, such as a key or a command."""


def escaped(text: object) -> str:
    """Text on one line in which Markdown sees no table cell, HTML, link, picture or code."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")


def code(text: object) -> str:
    """Text on one line as a code span. A pipe is escaped, as it would end a table's cell even there."""
    line = " ".join(str(text).split()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Text in rows and columns as a Markdown table.

    Args:
        head: the columns' titles.
        rows: cells of text, each escaped here; one that is `Code` becomes a code span.
        right: the columns, counted from 0, whose cells are aligned to the right.
    """
    import pandas as pd  # which takes half a second, and most stages write no table

    right = set(right)
    frame = pd.DataFrame(
        [[_cell(cell) for cell in row] for row in rows], columns=[_cell(cell) for cell in head]
    )
    alignment = ["right" if column in right else "left" for column in range(len(head))]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def _cell(text: str) -> str:
    return code(text) if isinstance(text, Code) else escaped(text)
