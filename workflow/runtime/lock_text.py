"""dvc.lock as text: one block of lines for each stage, in the form in which DVC writes it.

Its YAML is read and written by a library in pure Python, which takes a second for a hundred stages. Of a stage that
ran, one block changes.
"""

import re

HEAD = "schema: '2.0'\nstages:\n"
CONFLICT = re.compile(r"^(<<<<<<<|=======|>>>>>>>)( |$)", re.MULTILINE)
# The line that a stage's block begins with, and those that may follow: a text of several lines has empty ones.
_NAME = re.compile(r"  (\S.*):\n")
_REST = re.compile(r"(    .*)?\n")


def split(text: str) -> dict[str, str]:
    """Return the block of each stage, in order, by the stage's name as it stands there.

    Raises:
        ValueError: the text is not in the form in which DVC writes it.
    """
    blocks, rest = _blocks(text)
    if rest or not text.startswith(HEAD):
        raise ValueError(f"this is not as DVC writes it: {(rest or text)[:80]!r}")
    return blocks


def join(blocks: dict[str, str]) -> str:
    return HEAD + "".join(blocks.values())


def rescued(text: str) -> dict[str, str]:
    """Return the blocks that stand before damage, without the last of them, which may have lost its end."""
    return dict(list(_blocks(text)[0].items())[:-1])


def _blocks(text: str) -> tuple[dict[str, str], str]:
    """The blocks up to the first line that belongs to none, and the text from there on."""
    blocks, name, end = {}, "", len(HEAD)
    # Not splitlines(): it also splits at U+2028 and the like, which a text in params may hold.
    for line in re.findall(r"[^\n]*\n", text.removeprefix(HEAD)) if text.startswith(HEAD) else []:
        if (found := _NAME.fullmatch(line)) and found[1] not in blocks:
            name = found[1]
            blocks[name] = line
        elif name and _REST.fullmatch(line):
            blocks[name] += line
        else:
            break
        end += len(line)
    return blocks, text[end:]
