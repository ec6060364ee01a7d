"""What a text of the data must be."""

import unicodedata

from workflow.runtime.errors import UserError

NOT_SEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories: control, format, and separators


def says_something(text: str) -> bool:
    """Whether a text has a character that one sees: no space, and no control or format character."""
    return any(unicodedata.category(character) not in NOT_SEEN for character in text)


def check_text(text: str, what: str) -> None:
    """Raise a UserError if a text holds half of a surrogate pair, which no UTF-8 file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} with half of a surrogate pair (\\u{ord(text[error.start]):04x}, character {error.start + 1}), "
            "which is no text."
        ) from None
