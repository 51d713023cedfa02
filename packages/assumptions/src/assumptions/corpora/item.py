"""One record of any data set: a conversation, the group it belongs to, and what people said about it.

`messages` is the conversation as far as the set gives it; `script` holds user messages that are to follow the model's
own replies (push-backs, prepared turns). A turn is a user message, counted from 0: the one way to count them here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from assumptions.chats import Chat
from shared.errors import UserError
from shared.tokens import Message


class Skip(Exception):
    """A row that the set itself marks as unusable; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Item:
    """A record. `human` holds what people said (labels as numbers, None where missing); `meta` everything else."""

    id: str
    messages: tuple[Message, ...]
    group: str = ""
    source: str = ""
    script: tuple[str, ...] = ()
    human: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[str, ...]:
        """All user messages in order: those of the conversation, then the script."""
        return (*(m["content"] for m in self.messages if m["role"] == "user"), *self.script)

    def chat(self, turn: int = -1) -> Chat:
        """The conversation up to its user message number `turn` (negative: from the end), the script left out."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not -len(places) <= turn < len(places):
            raise UserError(f"{self.id} has {len(places)} user messages; there is no turn {turn}")
        at = places[turn]
        return Chat(self.id, self.messages[at]["content"], self.messages[:at], self.group, self.source)


def asked(text: str) -> tuple[Message, ...]:
    """A conversation of one user message."""
    return (Message(role="user", content=text),)


def require(row: object, *columns: str) -> None:
    """ValueError naming the first of these fields that holds no text, for the checks of a typed row."""
    for column in columns:
        value = getattr(row, column)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{column!r} is empty")


def label(value: str | float | bool | None, marks: Sequence[str] = ("ERROR", "nan")) -> float | None:
    """A human label as a number; None where the cell is empty or one of the set's own error `marks`.

    ValueError for anything else, so that a shifted column is noticed.
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not text or text in marks:
            return None
        if text.lower() in ("true", "false"):
            return float(text.lower() == "true")
        value = text
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"a label is a number, got {value!r}") from error
