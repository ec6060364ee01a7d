"""The errors that end a stage with a sentence for the terminal instead of a traceback."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

MOST_NAMED = 4  # items in one sentence


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what a misspelled name probably means, as the end of a sentence; empty if no name is close."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def first_of(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first few items for a sentence, and count the others."""
    more = len(items) - MOST_NAMED
    text = separator.join(items[:MOST_NAMED])
    return f"{text}{separator}and {more} more" if more > 0 else text


class UserError(Exception):
    """An error that the user can fix; its text is one clear sentence on one line.

    It may quote anything from a file, so line breaks and a terminal's control characters are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class UserErrors(UserError):
    """Several errors of one file: its text is a line that counts them, and one line for each."""

    def __init__(self, source: str, sentences: Sequence[str]):
        super().__init__(f"{source} has {len(sentences)} problems")
        self.sentences = tuple(sentences)

    @property
    def count(self) -> str:
        """How many there are, without a full stop."""
        return super().__str__()

    def __str__(self) -> str:
        return "\n  ".join([f"{self.count}:", *(str(UserError(_ended(each))) for each in self.sentences)])


def problems(source: str, sentences: Sequence[str]) -> UserError:
    """The error for what is wrong with a file.

    Args:
        source: the file.
        sentences: at least one, each without its full stop.
    """
    return (
        UserErrors(source, sentences)
        if len(sentences) > 1
        else UserError(f"{source}: {_ended(sentences[0])}")
    )


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith("?") else f"{sentence}."


def missing(path: object) -> UserError:
    """The error for a result that no stage has written yet."""
    return UserError(f"{path} is missing; `dvc repro` makes it.")


def damaged(path: object, reason: object) -> UserError:
    """The error for a result that cannot be read."""
    return UserError(f"{path} is damaged ({reason}): delete it, and `dvc repro` makes it again.")


class CheckError(UserError):
    """What was loaded, tokenized, trained or scored differs from the params, so its numbers would mislead."""
