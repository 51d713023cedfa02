"""Completions from any OpenAI-compatible server, many requests at a time.

Text and token ids go to /completions, messages to /chat/completions, where the server's own chat template applies.
A draw is one HTTP request with its own seed; connection failures, rate limits and server errors are tried again a
limited number of times with growing pauses (the client's own), then one error says what to do. A server that
presents itself as vLLM is also asked for token ids, and told to ignore the sampling defaults in the model's
generation_config.json (top-k, penalties), so that `Sampling` is the whole truth as it is in process.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared.errors import UserError
from shared.generation.openai_answers import chat_completion, text_completion
from shared.generation.pacing import Pace
from shared.generation.prompts import is_chat
from shared.generation.requests import Completion, Draw, EngineBase, PartFailedError, Sampling

VLLM_EXTRAS: dict[str, Any] = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class _NobodyError(UserError):
    """No server answers at the address."""


class OpenAIGenerator(EngineBase):
    """A server at `base_url` (ending in /v1) serving `model`; a request's adapter is another model name there.

    The key is `api_key`, or OPENAI_API_KEY in the environment, or none. `requests_per_minute` spaces the requests; a
    retry comes in addition, when the server asks for it. UserError when the server cannot be reached, refuses the key
    or does not list the model; PartFailedError, with the other answers, when it refuses some requests.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        concurrency: int = 64,
        max_retries: int = 4,
        timeout: float = 600.0,
        requests_per_minute: float | None = None,
    ) -> None:
        from openai import OpenAI

        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self._pace = Pace(requests_per_minute)
        self._client = OpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout)
        try:
            self._owners = self._list_models()
            self._check_model(model)
        except BaseException:
            self.close()
            raise
        self._is_vllm = self._owners.get(model) == "vllm"

    def _list_models(self) -> dict[str, str]:
        """Owner by model name; empty where the server keeps no list."""
        import openai

        try:
            return {card.id: card.owned_by for card in self._client.models.list()}
        except openai.NotFoundError:
            return {}
        except openai.OpenAIError as error:
            raise self._explained(error) from error

    def _check_model(self, name: str) -> None:
        if self._owners and name not in self._owners:
            raise UserError(
                f"{self.base_url} serves no model {name!r}; it serves: {', '.join(sorted(self._owners))}"
            )

    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        if (sampling.logprobs or 0) > 0 and not self._is_vllm:
            raise UserError(
                "logprobs > 0 needs token ids, which only vLLM servers tell: use logprobs=0 or None here"
            )
        for name in {draw.request.adapter for draw in draws} - {None}:
            self._check_model(str(name))
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            futures = [pool.submit(self._attempt, draw, sampling) for draw in draws]
            try:
                results = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return _whole(results, sampling.n)

    def _attempt(self, draw: Draw, sampling: Sampling) -> Completion | UserError:
        """A draw's completion, or why the server gave none; raises where nobody answers at all."""
        try:
            return self._complete_one(draw, sampling)
        except _NobodyError:
            raise
        except UserError as error:
            return error

    def _complete_one(self, draw: Draw, sampling: Sampling) -> Completion:
        import openai

        body, top = self._body(draw, sampling), sampling.logprobs or 0
        prompt: Any = draw.request.prompt
        self._pace.wait()
        try:
            if is_chat(prompt):
                chat_body = {**chat_logprobs(sampling.logprobs), **body}
                return chat_completion(
                    self._client.chat.completions.create(messages=prompt, **chat_body), top
                )
            text_body = {"logprobs": sampling.logprobs, **body}
            return text_completion(self._client.completions.create(prompt=prompt, **text_body), top)
        except openai.OpenAIError as error:
            raise self._explained(error) from error
        except ValueError as error:
            raise UserError(f"{self.base_url} sent what is no JSON ({error}): look into its log") from error

    def _body(self, draw: Draw, sampling: Sampling) -> dict[str, Any]:
        """The fields that both endpoints share."""
        extra = dict(VLLM_EXTRAS) if self._is_vllm else {}
        if draw.request.json_schema is not None:
            extra["response_format"] = response_format(draw.request.json_schema)
        body: dict[str, Any] = {
            "model": draw.request.adapter or self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": draw.seed,
            "extra_body": extra,
        }
        return body | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def _explained(self, error: Exception) -> UserError:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return UserError(f"{self.base_url} did not answer in time: raise timeout or lower concurrency")
        if isinstance(error, openai.APIConnectionError):
            return _NobodyError(
                f"cannot reach {self.base_url}: is the server running, and does the address end in /v1?"
            )
        if isinstance(error, openai.AuthenticationError):
            return UserError(f"{self.base_url} refused the key: pass api_key or set OPENAI_API_KEY")
        return UserError(f"{self.base_url} refused a request: {error}")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _whole(results: list[Completion | UserError], n: int) -> list[Completion]:
    """The completions of all draws, `n` a request; PartFailedError where some have none."""
    completions = [one for one in results if isinstance(one, Completion)]
    if len(completions) == len(results):
        return completions
    answers: list[list[Completion] | UserError] = []
    for start in range(0, len(results), n):
        group = results[start : start + n]
        own = [one for one in group if isinstance(one, Completion)]
        answers.append(own if len(own) == n else next(one for one in group if isinstance(one, UserError)))
    raise PartFailedError(answers)


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """The wire form of a JSON schema that the answer must obey."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def chat_logprobs(logprobs: int | None) -> dict[str, Any]:
    """The chat endpoint's two fields for what /completions says in one."""
    if logprobs is None:
        return {}
    return {"logprobs": True, "top_logprobs": logprobs} if logprobs else {"logprobs": True}
