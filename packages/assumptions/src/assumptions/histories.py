"""The next turn of a conversation in which every turn is elicited: what of an answer the model sees again.

`reply_only` keeps the reply alone, as a person would have read it; `full` keeps the whole answer with its self-report.
The two are different studies: a model that reads its own scores of turn t tends to repeat them in turn t + 1. An answer
that failed has no place in a history at all.
"""

from typing import Literal

from assumptions.chats import Chat
from assumptions.records import Record
from shared.errors import UserError
from shared.tokens import Message

Keep = Literal["reply_only", "full"]


def follow(chat: Chat, record: Record, turn: str, keep: Keep = "reply_only") -> Chat:
    """The chat whose next user message is `turn`, after the answer in `record`; UserError when that holds no reply."""
    if record.error is not None or not record.status.complete:
        raise UserError(
            f"{record.id}: the answer is {record.status.value}; ask it again before the next turn"
        )
    reply = record.text if keep == "full" else record.sections.get("RESPONSE", "")
    if not reply.strip():
        raise UserError(f"{record.id}: the answer holds no reply: take an instrument that ends with RESPONSE")
    if not turn.strip():
        raise UserError(f"{record.id}: the next user message is empty")
    said = Message(role="assistant", content=reply)
    history = (*chat.history, Message(role="user", content=chat.turn), said)
    return Chat(chat.id, turn, history, chat.group, chat.source)
