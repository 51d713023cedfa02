"""Errors that are the user's to mend: they are shown as one line, without a traceback."""

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(Exception):
    """Bad input or a missing prerequisite; the message says what is wrong and what to do about it."""


def told(error: BaseException) -> str | None:
    """What a user is told of an error that is theirs to mend; None where it is a defect, which keeps its traceback.

    Theirs are every `UserError` and the operating system's refusal of a file that it names, or of a full disk.
    """
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _FULL):
        return None
    place = "" if error.filename is None else f"{error.filename}: "
    remedy = "free some space" if error.errno in _FULL else "give another path, or mend this one"
    return f"{place}{error.strerror or error}; {remedy}"
