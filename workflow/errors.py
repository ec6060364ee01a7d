"""The one error that a user can cause: a sentence for the terminal instead of a traceback."""


class UserError(Exception):
    """Something that the user can mend; its text is one clear sentence."""
