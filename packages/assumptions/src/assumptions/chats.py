"""What is asked about: one user message after its history, with the group that must stay on one side of a split.

Files are read by `shared.data` (JSON, JSON lines, CSV, or a saved dataset): `text` is the user's message; `id`,
`group`, `source` and `history` (a list of role and content) are optional. No history may be written as nothing, [],
null or nan.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data import read_rows
from shared.errors import UserError
from shared.tokens import Message


@dataclass(frozen=True)
class Chat:
    """A user message `turn` after `history`; rows of one `group` (a user, a conflict, a paraphrase) belong together."""

    id: str
    turn: str
    history: tuple[Message, ...] = ()
    group: str = ""
    source: str = ""

    @property
    def messages(self) -> list[Message]:
        """History and turn as one chat, as the model reads them when it replies."""
        return [*self.history, Message(role="user", content=self.turn)]


@dataclass(frozen=True)
class ChatRow:
    """The columns of a file of chats; a history in a CSV cell is JSON."""

    text: str
    id: str | None = None
    group: str | None = None
    source: str | None = None
    history: list[dict[str, str]] | str | float | None = None

    def __post_init__(self) -> None:
        read_history(self.history)


def read_history(cell: Any) -> tuple[Message, ...]:
    """The messages of a history cell; none for "", "nan", nan, None or []. ValueError for what is no history."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ()
    if isinstance(cell, str):
        if cell.strip().lower() in ("", "nan", "none", "null"):
            return ()
        cell = json.loads(cell)
    if not isinstance(cell, list):
        raise ValueError(f"a history is a list of messages, got {cell!r}")
    for turn in cell:
        if not (isinstance(turn, dict) and isinstance(turn.get("content"), str)):
            raise ValueError(f"a message of a history has a role and a content, got {turn!r}")
        if turn.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"a role is system, user or assistant, got {turn.get('role')!r}")
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in cell)


def text_key(text: str) -> str:
    """16 hexadecimal digits that texts share which differ in case and white space only."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]


def read_chats(path: Path | str, columns: Mapping[str, str] | None = None) -> list[Chat]:
    """Read chats from a file; `columns` maps the names of `ChatRow` to the file's own, further columns are ignored.

    UserError names the file and what is wrong with it: no rows, a row without text, an id that stands twice.
    """
    path = Path(path)
    rows = read_rows(path, ChatRow, columns=columns, drop_extra=True)
    chats = [_chat(row, number, path.stem) for number, row in enumerate(rows, start=1)]
    if not chats:
        raise UserError(f"{path} holds no rows")
    empty = next((chat.id for chat in chats if not chat.turn.strip()), None)
    if empty is not None:
        raise UserError(f"{path}: the row with id {empty!r} has no text; drop it or fill it in")
    twice = [name for name, count in Counter(chat.id for chat in chats).items() if count > 1]
    if twice:
        raise UserError(f"{path}: id {twice[0]!r} stands on more than one row; ids must be unique")
    return chats


def _chat(row: ChatRow, number: int, source: str) -> Chat:
    history = read_history(row.history)
    return Chat(row.id or str(number), row.text, history, row.group or "", row.source or source)
