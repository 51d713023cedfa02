"""The base of every error that is the user's to mend: it is shown as one line, without a traceback."""


class UserError(Exception):
    """Bad input or a missing prerequisite; the message says what is wrong and what to do about it."""
