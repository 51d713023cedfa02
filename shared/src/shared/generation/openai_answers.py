"""Read the answers of the two completion endpoints, with vLLM's additions (token ids) where they are present."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.generation.requests import Completion

if TYPE_CHECKING:
    from openai.types import Completion as TextAnswer
    from openai.types.chat import ChatCompletion

TOKEN_ID = "token_id:"  # how vLLM spells a token when asked for ids in place of text


def text_completion(answer: "TextAnswer", top: int) -> Completion:
    """The single choice of a /completions answer, with the `top` likeliest tokens a position."""
    choice = _first(answer)
    told = choice.logprobs
    logprobs = (
        [] if told is None else [float(value) for value in told.token_logprobs or [] if value is not None]
    )
    steps = (told.top_logprobs or []) if told is not None and top else []
    return _completion(choice, choice.text, logprobs, [likeliest(step or {}, top) for step in steps])


def chat_completion(answer: "ChatCompletion", top: int) -> Completion:
    """The single choice of a /chat/completions answer, with the `top` likeliest tokens a position."""
    choice = _first(answer)
    steps = (choice.logprobs.content or []) if choice.logprobs is not None else []
    entries = [{entry.token: entry.logprob for entry in step.top_logprobs} for step in steps] if top else []
    ranked = [likeliest(step, top) for step in entries]
    return _completion(choice, choice.message.content or "", [step.logprob for step in steps], ranked)


def _first(answer: Any) -> Any:
    """The first choice; UserError where the server sent something else."""
    choices = getattr(answer, "choices", None)
    if (
        not isinstance(choices, list)
        or not choices
        or (hasattr(choices[0], "message") and not choices[0].message)
    ):
        raise UserError(f"the server's answer holds no choice: {str(answer)[:80]!r}; look into its log")
    return choices[0]


def _completion(choice: Any, text: str, logprobs: list[float], top: list[dict[int, float]]) -> Completion:
    if choice.finish_reason not in ("stop", "length"):
        raise UserError(f"the server ended a request with {choice.finish_reason!r}: look into its log")
    ids = list(getattr(choice, "token_ids", None) or [])
    return Completion(text, ids, logprobs, choice.finish_reason, top)


def likeliest(step: Mapping[str, float], top: int) -> dict[int, float]:
    """The `top` likeliest tokens of one position by id, most likely first."""
    ranked = sorted(step.items(), key=lambda item: -item[1])[:top]
    return {token_id(token): logprob for token, logprob in ranked}


def token_id(token: str) -> int:
    """The id in vLLM's spelling `token_id:17`; UserError for a token told as text."""
    if not token.startswith(TOKEN_ID):
        raise UserError(
            f"the server told a token as text, not as an id: {token!r}; use logprobs=0 or None here"
        )
    return int(token.removeprefix(TOKEN_ID))
