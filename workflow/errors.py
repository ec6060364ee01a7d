"""The errors that end a stage with a sentence for the terminal instead of a traceback."""


class UserError(Exception):
    """Something that the user can mend; its text is one clear sentence."""


class CheckError(UserError):
    """What was loaded, tokenised, trained or scored is not what was asked for, so its numbers would mislead."""
