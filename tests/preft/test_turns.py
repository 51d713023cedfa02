"""`preft serve` finds the earlier answers of a chat under a sticky adapter, or refuses the chat."""

import asyncio
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from preft.adapters import Adapter, AdapterConfig
from preft.formats import save_adapter
from preft.serve.turns import find_turns
from preft.vllm.requests import adapter_request
from preft.vllm.sticky import KEY, generated_positions
from shared.history import History
from shared.models import Model, load
from shared.tokens import Message, encode_chat

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]
CHAT = [
    Message(role="user", content="Where is Boston?"),
    Message(role="assistant", content="In Massachusetts."),
    Message(role="user", content="And Austin?"),
]


@cache
def tokenizer() -> Any:
    return load("tinyworld").tokenizer


class Renderer:
    """Stands for vLLM's OnlineRenderer; `shift` renders a chat otherwise than the template of the tokenizer."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.renderer = SimpleNamespace(tokenizer=tokenizer())

    async def render_chat(self, request: Any) -> Any:
        encoded = encode_chat(self.renderer.tokenizer, request.messages, add_generation_prompt=True)
        return request.messages, [{"prompt_token_ids": [token + self.shift for token in encoded.ids]}]

    async def render_responses(self, request: Any, *, previous_messages: Any = None) -> Any:
        return "rendered"


@pytest.fixture(scope="module")
def models(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two adapters, `sticky` and `recompute`."""
    root = tmp_path_factory.mktemp("turns")
    adapters = {
        history.value: Adapter.create(model.hf, AdapterConfig(rank=2, history=history)) for history in History
    }
    saved = {name: save_adapter(adapter, root / name) for name, adapter in adapters.items()}
    requests = {name: adapter_request(name, saved) for name in saved}
    return SimpleNamespace(lora_requests=requests)


def chat(
    models: Any, renderer: Renderer, name: str, messages: Sequence[Any] = CHAT, xargs: Any = None
) -> Any:
    """What the renderer answers, and the request's extra arguments then."""
    find_turns(models, renderer)
    request = SimpleNamespace(model=name, messages=list(messages), vllm_xargs=xargs)
    return asyncio.run(renderer.render_chat(request)), request.vllm_xargs


def test_earlier_answers_are_found(models: Any) -> None:
    expected = generated_positions(tokenizer(), CHAT)
    assert len(expected) == 2
    assert chat(models, Renderer(), "sticky")[1] == {KEY: expected}
    assert chat(models, Renderer(), "sticky", xargs={"other": 1})[1] == {"other": 1, KEY: expected}


@pytest.mark.parametrize(
    ("name", "messages", "xargs"),
    [
        ("recompute", CHAT, None),
        ("base", CHAT, None),
        ("sticky", CHAT[:1], None),
        ("sticky", CHAT, {KEY: [1, 2]}),
    ],
)
def test_other_requests_stay_as_they_are(models: Any, name: str, messages: Any, xargs: Any) -> None:
    assert chat(models, Renderer(), name, messages, xargs)[1] == xargs


@pytest.mark.parametrize(
    "messages", [[*CHAT[:1], {"role": "assistant", "content": [{"type": "text", "text": "In"}]}], CHAT]
)
def test_what_is_not_sure_is_refused(models: Any, messages: Any) -> None:
    renderer = Renderer(shift=1)
    if messages is not CHAT:

        async def as_vllm_does(request: Any) -> Any:
            return messages, [{"prompt_token_ids": [1, 2, 3]}]

        renderer.render_chat = as_vllm_does  # type: ignore[method-assign]
    answer, xargs = chat(models, renderer, "sticky", messages)
    assert (answer.error.code, xargs) == (400, None)
    assert "vllm_xargs" in answer.error.message


@pytest.mark.parametrize(
    ("name", "given", "previous", "refused"),
    [
        ("sticky", "Where is Boston?", None, False),
        ("sticky", CHAT[:1], None, False),
        ("sticky", CHAT, None, True),
        ("sticky", [SimpleNamespace(type="function_call")], None, True),
        ("sticky", "And Austin?", "resp_1", True),
        ("recompute", CHAT, "resp_1", False),
    ],
)
def test_the_responses_api_answers_first_turns(
    models: Any, name: str, given: Any, previous: str | None, refused: bool
) -> None:
    renderer = Renderer()
    find_turns(models, renderer)
    request = SimpleNamespace(model=name, input=given, previous_response_id=previous, vllm_xargs=None)
    answer = asyncio.run(renderer.render_responses(request))
    assert answer == "rendered" if not refused else answer.error.code == 400
