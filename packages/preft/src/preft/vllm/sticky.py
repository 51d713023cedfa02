"""Sticky history in serving: earlier answers in a chat stay generated text, as in training (`shared.history`).

A request is token ids, so the client says where the earlier answers are, in one flat list of positions

    SamplingParams(extra_args={"preft_generated": [start, end, start, end, ...]})       over HTTP: "vllm_xargs"

(`generated_positions` makes it from messages; `preft serve` does so itself in its routes for chats). Under an adapter
of history `sticky` those tokens are of kind generated, and the token in front of each stretch is a boundary; other
adapters do not read it. Nothing given means a chat of one turn. So the blocks of an earlier answer get the keys they
had when it was generated, and the next turn finds them in the prefix cache.

Scheduler and runner read the same list: the scheduler's request has it among its sampling parameters, the runner gets
it with the adapter (`placed`).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from preft.vllm.mapping import ENDLESS
from shared.tokens import Encoded, Message, encode_chat

KEY = "preft_generated"

Spans = tuple[tuple[int, int], ...]  # [start, end) of every earlier answer, in order


def generated_positions(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Where the earlier answers of a chat are in its prompt: start, end, start, end, ...

    ChatTemplateError where the template does not let them be found.
    """
    return positions_of(encode_chat(tokenizer, messages, add_generation_prompt=True))


def positions_of(encoded: Encoded) -> list[int]:
    """The same of a chat that was encoded with its generation prompt."""
    spans = [span for span in encoded.spans[:-1] if span.role == "assistant"]
    return [position for span in spans for position in (span.content_start, span.generated_end)]


def read_spans(extra_args: Mapping[str, Any] | None, prompt_length: int = ENDLESS) -> Spans:
    """The spans that a request gives, () if none; ValueError unless they ascend within the prompt (if it is given)."""
    given = (extra_args or {}).get(KEY)
    if not given:
        return ()
    numbers = isinstance(given, (list, tuple)) and all(type(value) is int for value in given)
    ends = [0, *given, prompt_length] if numbers else []
    ascend = all(low <= high for low, high in pairwise(ends))
    spans = tuple(zip(given[::2], given[1::2])) if numbers and len(given) % 2 == 0 else ()
    if not spans or not ascend or any(low == high for low, high in spans):
        raise ValueError(
            f"{KEY} must be positions start, end, start, end, ... of earlier answers, ascending within the prompt"
            + (f" of {prompt_length} tokens" if prompt_length < ENDLESS else "")
            + f", not {given!r}"
        )
    return spans


def placed(lora_request: Any, spans: Spans) -> Any:
    """The adapter as one request's runner gets it: with the spans of that request."""
    import msgspec

    return placed_class()(**msgspec.structs.asdict(lora_request), generated=spans) if spans else lora_request


@cache
def placed_class() -> type:
    """The class `PlacedLoRARequest`, built on first use because its base imports vLLM."""
    from vllm.lora.request import LoRARequest

    class PlacedLoRARequest(LoRARequest):
        """An adapter with the spans of one request."""

        generated: Spans = ()

    PlacedLoRARequest.__module__ = __name__
    PlacedLoRARequest.__qualname__ = "PlacedLoRARequest"
    return PlacedLoRARequest


def __getattr__(name: str) -> Any:
    # The class is looked up by name where another process unpickles one.
    if name == "PlacedLoRARequest":
        return placed_class()
    raise AttributeError(name)
