"""The text of dvc.lock: a block of lines for each stage, in the form in which DVC writes it.

DVC reads and writes this YAML with a library in pure Python, which takes a second for a hundred stages; a stage that ran
changes one block.
"""

import re
from contextlib import suppress
from pathlib import Path

from workflow.runtime.files import write_text
from workflow.runtime.paths import DVC_LOCK

TEMPORARY = Path(".dvc") / "tmp"
COPY = TEMPORARY / "dvc.lock.copy"
HEAD = "schema: '2.0'\nstages:\n"
CONFLICT = re.compile(r"^(<<<<<<<|=======|>>>>>>>)( |$)", re.MULTILINE)
# A block begins with the stage's name; its other lines are indented further, or empty inside a text of several lines.
_NAME = re.compile(r"  (\S.*):\n")
_REST = re.compile(r"(    .*)?\n")


def split_blocks(text: str) -> dict[str, str]:
    """Return the block of each stage, in order, by the stage's name as it stands there.

    Raises:
        ValueError: the text is not in the form in which DVC writes it.
    """
    blocks, rest = _leading_blocks(text)
    if rest or not text.startswith(HEAD):
        raise ValueError(f"this is not as DVC writes it: {(rest or text)[:80]!r}")
    return blocks


def join_blocks(blocks: dict[str, str]) -> str:
    """Return the text of a dvc.lock with these blocks."""
    return HEAD + "".join(blocks.values())


def salvage_blocks(text: str) -> dict[str, str]:
    """Return the blocks that precede the damage, without the last of them, whose end may be missing."""
    return dict(list(_leading_blocks(text)[0].items())[:-1])


def keep_copy_of_lock() -> None:
    """Keep a copy of dvc.lock when a stage begins: plain `dvc repro` empties the file when the stage has ended."""
    with suppress(OSError, ValueError):
        text = DVC_LOCK.read_text(encoding="utf-8")
        if TEMPORARY.is_dir() and split_blocks(text):
            write_text(COPY, text)


def _leading_blocks(text: str) -> tuple[dict[str, str], str]:
    """Return the blocks up to the first line that belongs to none, and the text from there on."""
    blocks, name, end = {}, "", len(HEAD)
    # Not splitlines(): it also splits at U+2028 and the like, which a text in params may hold.
    for line in re.findall(r"[^\n]*\n", text.removeprefix(HEAD)) if text.startswith(HEAD) else []:
        if (match := _NAME.fullmatch(line)) and match[1] not in blocks:
            name = match[1]
            blocks[name] = line
        elif name and _REST.fullmatch(line):
            blocks[name] += line
        else:
            break
        end += len(line)
    return blocks, text[end:]
