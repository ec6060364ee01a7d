"""The errors that end a stage with a sentence for the terminal instead of a traceback."""


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
    """What was loaded, tokenised, trained or scored is not what was asked for, so its numbers would mislead."""
