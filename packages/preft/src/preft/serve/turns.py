"""Earlier answers in a chat under a sticky adapter, where the client does not say which tokens they are.

Only where vLLM makes token ids of messages (`OnlineRenderer`, behind all routes for chats) are both at hand. There the
positions are found as for training (`shared.chat.encode_chat`) and enter the request as if the client had given them
(`preft_generated`, `preft.vllm.sticky`). A chat that is not rendered to the very same tokens (tools, parts that are no
text, another template) is refused, and so are earlier answers of the Responses API, which are not in the request: taken
for prompt, they would be read under other weights than they were written.
"""

import copy
from collections.abc import Sequence
from typing import Any

from preft.adapters import AdapterError
from preft.serve.guard import error_response
from preft.vllm.scheduling import is_sticky
from preft.vllm.sticky import KEY, positions_of
from shared.errors import UserError
from shared.tokens import Message, encode_chat

ANSWERS = {"assistant", None}  # roles; a call or a thought has none
ADVICE = f"give {KEY} in vllm_xargs, positions start, end, start, end, ... of earlier answers in the prompt's tokens"


def find_turns(models: Any, renderer: Any) -> None:
    """Let vLLM's OnlineRenderer say where earlier answers are; `models` is the server's OpenAIServingModels."""
    chat, responses = renderer.render_chat, renderer.render_responses
    tokenizer = copy.deepcopy(renderer.renderer.tokenizer)  # one's own: vLLM uses its from other threads

    def unsaid(request: Any) -> bool:
        lora = models.lora_requests.get(request.model)
        return is_sticky(lora) and KEY not in (request.vllm_xargs or {})

    async def render_chat(request: Any, **options: Any) -> Any:
        result = await chat(request, **options)
        if not (isinstance(result, tuple) and unsaid(request) and _has_answers(request.messages)):
            return result
        try:
            positions = found(tokenizer, request.messages, result[1])
        except AdapterError as error:
            return error_response(error)
        request.vllm_xargs = (request.vllm_xargs or {}) | {KEY: positions}
        return result

    async def render_responses(request: Any, *, previous_messages: Any = None, **options: Any) -> Any:
        given = request.input if isinstance(request.input, list) else []
        if unsaid(request) and (previous_messages or request.previous_response_id or _has_answers(given)):
            return error_response(
                AdapterError(
                    f"adapter {request.model!r} reads earlier answers as they were written (history sticky), and "
                    "/v1/responses does not say where they are: use /v1/chat/completions"
                )
            )
        return await responses(request, previous_messages=previous_messages, **options)

    renderer.render_chat, renderer.render_responses = render_chat, render_responses


def found(tokenizer: Any, messages: Sequence[Any], rendered: Sequence[Any]) -> list[int]:
    """Positions of the earlier answers in the prompt that vLLM made of messages; AdapterError where none is sure."""
    try:
        plain = [Message(role=message["role"], content=message.get("content")) for message in messages]
        encoded = encode_chat(tokenizer, plain, add_generation_prompt=True)
    except UserError as error:
        raise AdapterError(f"where the earlier answers are cannot be found ({error}): {ADVICE}") from error
    if [prompt.get("prompt_token_ids") for prompt in rendered] != [encoded.ids]:
        raise AdapterError(
            f"where the earlier answers are cannot be found in a chat rendered in this way: {ADVICE}"
        )
    return positions_of(encoded)


def _has_answers(items: Sequence[Any]) -> bool:
    roles = (item.get("role") if isinstance(item, dict) else getattr(item, "role", None) for item in items)
    return any(role in ANSWERS for role in roles)
