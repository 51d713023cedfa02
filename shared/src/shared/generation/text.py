"""From new token ids to text, token by token as vLLM does it, so that both engines give the same text.

A token's text depends on what precedes it (a leading blank, a character split over tokens), so the stream starts with
the prompt; a character that is still incomplete is held back. After each token the text is searched for stop strings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Decoded(NamedTuple):
    """New text, the tokens it took (up to the one that completed a stop string), and whether there was one."""

    text: str
    n_tokens: int
    stopped: bool


class TextStream:
    """The text of a growing answer, without special tokens: what each new token adds to the prompt and those before."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The new text, empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


def decode_new(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()
) -> Decoded:
    """Text that `tokens` add to `prompt`, without special tokens, cut before the stop string that completes first."""
    stream = TextStream(tokenizer, prompt)
    text = ""
    for n_tokens, token in enumerate(tokens, 1):
        searched = len(text)
        text += stream.add(token)
        start = stop_start(text, searched, stop)
        if start is not None:
            return Decoded(text[:start], n_tokens, True)
    return Decoded(text, len(tokens), False)


def stop_start(text: str, searched: int, stop: Sequence[str]) -> int | None:
    """Where the stop string that completes first begins; the first `searched` characters hold no complete one."""
    ends: dict[int, int] = {}
    for word in stop:
        start = text.find(word, max(0, searched - len(word) + 1))
        if start >= 0:
            ends.setdefault(start + len(word), start)  # of two that end together the first listed counts
    return ends[min(ends)] if ends else None
