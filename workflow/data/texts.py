"""Check the texts of a dataset."""

import unicodedata

from workflow.runtime.errors import UserError

NOT_SEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories: control, format, and separators


def says_something(text: str) -> bool:
    """Whether a text has a visible character: not a space, control or format character."""
    return any(unicodedata.category(character) not in NOT_SEEN for character in text)


def check_text(text: str, subject: str) -> None:
    """Raise a UserError if a text holds half of a surrogate pair, which UTF-8 cannot encode.

    Args:
        subject: the beginning of the sentence, up to its verb.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{subject} with half of a surrogate pair (\\u{ord(text[error.start]):04x}, character {error.start + 1}), "
            "which is no text."
        ) from None
