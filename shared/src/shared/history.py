"""What earlier assistant text counts as in a chat of several turns; one enum for trainer and server."""

from enum import StrEnum


class History(StrEnum):
    """RECOMPUTE: everything before the new response is prompt. STICKY: generated tokens stay generated."""

    RECOMPUTE = "recompute"
    STICKY = "sticky"
