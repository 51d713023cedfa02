"""Prompts as token ids, the same for every engine that runs in this process."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from shared.errors import UserError
from shared.generation.requests import Prompt
from shared.tokens import Message, encode_chat, encode_text


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text with one BOS where the tokenizer adds one, messages through its chat template
    with the generation prompt, ids as they are.
    """
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    if is_chat(prompt):
        return list(encode_chat(tokenizer, cast(list[Message], prompt), add_generation_prompt=True).ids)
    return list(cast(list[int], prompt))


def is_chat(prompt: str | Sequence[Any]) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def check_lengths(lengths: Iterable[int], limit: int) -> None:
    """UserError naming the first prompt that leaves no room for a token in a context of `limit` tokens."""
    for number, length in enumerate(lengths):
        if length >= limit:
            raise UserError(
                f"prompt {number} is {length} tokens long and the context holds {limit}: shorten it"
            )
