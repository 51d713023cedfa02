"""How a chat becomes token ids, and which of them a feature is pooled over.

`chat`: the model's template with the generation prompt, the very ids a reply is generated from, so that what is read is
what is steered (fault T11 of the released code, which reads raw text and steers under a template). `raw`: the text of
the last user message alone, with BOS where the tokenizer has the habit; history has no place in it.

Spans: `user`, the text of the last user message; `last`, the last token of the prompt; `prompt`, everything but a
leading BOS.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from assumptions.chats import Chat
from shared.chat import encode_text
from shared.errors import UserError
from shared.tokens import Message, encode_chat

Span = Literal["user", "last", "prompt"]
Form = Literal["chat", "raw"]


@dataclass(frozen=True)
class Rendered:
    """The ids of a prompt and the positions of the last user message's text among them."""

    ids: list[int]
    user: range

    def positions(self, span: Span, bos_token_id: int | None) -> range:
        """Positions of the span among the row's real tokens."""
        if span == "last":
            return range(len(self.ids) - 1, len(self.ids))
        if span == "prompt":
            return range(int(self.ids[0] == bos_token_id), len(self.ids))
        return self.user


def prompt_of(chat: Chat, form: Form) -> str | list[Message]:
    """What `Model.encode` takes for a chat in a form."""
    return chat.messages if form == "chat" else chat.turn


def render(tokenizer: Any, chat: Chat, form: Form = "chat") -> Rendered:
    """The ids of a chat in a form; UserError when it holds no user message."""
    if form == "raw":
        ids = encode_text(tokenizer, chat.turn)
        return Rendered(ids, range(int(bool(ids) and ids[0] == tokenizer.bos_token_id), len(ids)))
    encoded = encode_chat(tokenizer, chat.messages, add_generation_prompt=True)
    user = [span for span in encoded.spans if span.role == "user"]
    if not user:
        raise UserError(f"chat {chat.id!r} has no message of a user")
    return Rendered(encoded.ids, range(user[-1].content_start, user[-1].content_end))


def rendering_hash(tokenizer: Any, form: Form = "chat") -> str:
    """16 hexadecimal digits that change with the form, the chat template and the tokenizer."""
    ids = render(tokenizer, Chat("", "one, two"), form).ids
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
