"""The errors that end a stage with a sentence for the terminal instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(name: str, known: Iterable[str]) -> str:
    """What a misspelled name was to be, to end a sentence with; nothing where no name is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class UserError(Exception):
    """Something that the user can mend; its text is one clear sentence on one line.

    What it quotes from a file may hold anything: a line break or a terminal's control character is shown escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class CheckError(UserError):
    """What was loaded, tokenized, trained or scored is not what was asked for, so its numbers would mislead."""
