"""Messages to token ids with role spans, through the model's own chat template, whatever it does.

1. Render the chat twice: once as it is, once with every content replaced by a unique marker. The markers give the
   template's literal text around each content.
2. Match the real rendering against literals and contents (as given, or stripped where the template strips). If they
   do not fit, the template rewrites contents and spans cannot be trusted: `ChatTemplateError`.
3. Tokenise the real rendering once, and turn character offsets into token boundaries.
4. The tokens in front of the last assistant content must be exactly those the model is prompted with, so that training
   and serving see the same prompt; otherwise `ChatTemplateError`.

A generated token is one the model emits itself: an assistant's content and the end-of-turn token after it, with the
white space that a template puts between the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from shared.errors import UserError
from shared.history import History

_MARK = "zq{}qz"


class ChatTemplateError(UserError):
    """A chat that the template refuses or rewrites so that role spans cannot be found."""


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Span:
    """Token range of one message, half open.

    `start` to `end` is the message with its header and end-of-turn token, `content_start` to `content_end` its text,
    `content_start` to `generated_end` what a model emits for it (text and end-of-turn token).
    """

    role: str
    start: int
    end: int
    content_start: int
    content_end: int
    generated_end: int


@dataclass(frozen=True)
class Encoded:
    """Token ids of a chat and one span a message, in the order of appearance."""

    ids: list[int]
    spans: list[Span]
    text: str

    def generated(self, history: History = History.STICKY) -> list[bool]:
        """For every token whether it counts as generated under a history policy, earlier turns only.

        RECOMPUTE has none; STICKY has the assistant turns in front of the last one (or all of them, where a
        generation prompt follows). The last response is what the prompt length marks.
        """
        flags = [False] * len(self.ids)
        if history == History.STICKY:
            for span in self.spans:
                if span.role == "assistant" and span is not self.spans[-1]:
                    flags[span.content_start : span.generated_end] = [True] * (
                        span.generated_end - span.content_start
                    )
        return flags


@dataclass(frozen=True)
class TrainingRow:
    """One row to train on: labels are the ids of generated tokens and -100 elsewhere.

    `prompt_length` is n of the last response; `generated` marks the earlier responses (STICKY only).
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    generated: list[bool]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain text, with exactly one BOS where the tokenizer has the habit of adding one."""
    return _one_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> Encoded:
    """Ids of a chat through the tokenizer's own template, with exactly one BOS, and the span of every message.

    Raises:
        ChatTemplateError: no template, the template refuses the chat, or spans cannot be aligned.
    """
    messages = _check(messages)
    text = _render(tokenizer, messages, add_generation_prompt)
    regions = _content_regions(tokenizer, messages, add_generation_prompt, text)
    ids, offsets = _tokenise(tokenizer, text)
    special = _special_ids(tokenizer)
    spans: list[Span] = []
    start = 0
    for role, first, last in regions:
        content_start, content_end = _tokens_at(offsets, first, last, role)
        end = _turn_end(text, ids, offsets, special, content_end, role)
        spans.append(Span(role, start, end, content_start, content_end, end))
        start = end
    return Encoded(ids, spans, text)


def training_row(
    tokenizer: Any, messages: Sequence[Message], history: History = History.RECOMPUTE
) -> TrainingRow:
    """A chat that ends with an assistant message as a training row.

    RECOMPUTE puts the loss on the last response only (one row a turn); STICKY on every response, since no token is
    then both adapted history and unadapted response.

    Raises:
        ChatTemplateError: as `encode_chat`; no end token after the last response; its prompt is not the one of serving.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("A training chat must end with an assistant message: its text is what is learnt.")
    encoded = encode_chat(tokenizer, messages)
    last = encoded.spans[-1]
    if last.generated_end == last.content_end:
        raise ChatTemplateError(
            "The chat template puts no special token after the last assistant message, so a model trained on it would "
            "not learn to stop. Let the template end assistant messages with {{ eos_token }}."
        )
    _check_prompt(tokenizer, messages, encoded.ids[: last.content_start])
    learnt = encoded.generated(history)
    labels = [
        token if earlier or last.content_start <= t < last.generated_end else -100
        for t, (token, earlier) in enumerate(zip(encoded.ids, learnt))
    ]
    return TrainingRow(encoded.ids, labels, last.content_start, learnt)


def _check(messages: Sequence[Message]) -> list[Message]:
    if not messages:
        raise UserError("A chat needs at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f"Message {index} must be a dict with 'role' and 'content', not {message!r}.")
        if not isinstance(message["content"], str):
            raise UserError(
                f"Message {index}: content must be text, not {type(message['content']).__name__}."
            )
    return list(messages)


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            "This tokenizer has no chat template. Pass plain text, or set tokenizer.chat_template."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ChatTemplateError(f"The chat template refuses this chat (roles {roles}): {error}") from None


def _content_regions(
    tokenizer: Any, messages: list[Message], add_generation_prompt: bool, text: str
) -> list[tuple[str, int, int]]:
    """Role and character range of every content in the rendered text."""
    marked = [Message(role=m["role"], content=_MARK.format(i)) for i, m in enumerate(messages)]
    skeleton = _render(tokenizer, marked, add_generation_prompt)
    pieces = re.split(_MARK.format(r"(\d+)"), skeleton, flags=re.IGNORECASE)
    literals, order = pieces[0::2], [int(index) for index in pieces[1::2]]
    if sorted(order) != list(range(len(messages))):
        raise ChatTemplateError(
            "The chat template drops or repeats a message, so role spans cannot be found. "
            "Leave that message out, or use a template that shows every message once."
        )
    regions, position = [], len(literals[0])
    fits = text.startswith(literals[0])
    for index, literal in zip(order, literals[1:]):
        length = _matching_length(text, position, messages[index]["content"], literal) if fits else None
        if length is None:
            raise ChatTemplateError(
                f"The chat template rewrites message {index} ({messages[index]['role']}), so role spans cannot be "
                f"aligned. Check that message for markup that the template treats specially."
            )
        regions.append((messages[index]["role"], position, position + length))
        position += length + len(literal)
    if position != len(text):
        raise ChatTemplateError("The chat template renders this chat differently from its skeleton.")
    return regions


def _matching_length(text: str, position: int, content: str, literal: str) -> int | None:
    for variant in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.startswith(variant + literal, position):
            return len(variant)
    return None


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ChatTemplateError("Role spans need a fast tokenizer (one with tokenizer.json).")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], [tuple(pair) for pair in encoding["offset_mapping"]]
    fixed = _one_bos(tokenizer, ids)
    dropped = max(0, len(ids) - len(fixed))
    added = max(0, len(fixed) - len(ids))
    return fixed, [(0, 0)] * added + offsets[dropped:]


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return list(ids)
    leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds = tokenizer("")["input_ids"][:1] == [bos]
    return [bos] * min(1, max(leading, int(adds))) + list(ids[leading:])


def _tokens_at(offsets: list[tuple[int, int]], first: int, last: int, role: str) -> tuple[int, int]:
    """Tokens of the characters first to last; a token that crosses either end cannot be assigned."""
    inside = [i for i, (start, end) in enumerate(offsets) if end > start and start < last and end > first]
    if not inside:
        before = sum(1 for start, end in offsets if end <= first)
        return before, before
    crossing = offsets[inside[0]][0] < first or offsets[inside[-1]][1] > last
    if crossing and role == "assistant":
        raise ChatTemplateError(
            "A token spans the border of an assistant message, so prompt and response cannot be told apart. "
            "Strip leading and trailing whitespace from the message."
        )
    return inside[0], inside[-1] + 1


def _turn_end(
    text: str, ids: list[int], offsets: list[tuple[int, int]], special: set[int], content_end: int, role: str
) -> int:
    """End of a turn: after the special token that follows its content, else the end of the content.

    White space may stand between an answer and its end token (Llama-2); in other roles it belongs to the next header.
    """
    end = content_end
    while role == "assistant" and end < len(ids) and ids[end] not in special:
        if text[slice(*offsets[end])].strip():
            break
        end += 1
    return end + 1 if end < len(ids) and ids[end] in special else content_end


def _special_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _check_prompt(tokenizer: Any, messages: Sequence[Message], prompt: list[int]) -> None:
    text = _render(tokenizer, messages[:-1], True) if len(messages) > 1 else None
    if text is not None and _tokenise(tokenizer, text)[0] != prompt:
        raise ChatTemplateError(
            "With this template the tokens in front of the last assistant message differ from the prompt the model "
            "is given at generation, so training would not match serving. Use a template whose generation prompt "
            "equals its assistant header."
        )
