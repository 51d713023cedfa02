"""Graceful shutdown: once vLLM begins to drain, new requests get status 503 and running ones go on.

vLLM's server answers SIGTERM by shutting its engine client down, which lets running requests finish for up to
`--shutdown-timeout` seconds; but it goes on accepting requests, whose generation it then aborts. A load balancer and
the OpenAI clients know what to do with 503 and Retry-After: try elsewhere, or again.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

RETRY_AFTER = 5  # seconds


class Drain:
    """Whether the server has begun to shut down."""

    def __init__(self) -> None:
        self.begun = False

    def watch(self, engine_client: Any) -> None:
        """Learn of the shutdown from the first call that vLLM makes for it."""
        shutdown = engine_client.shutdown

        def begin(timeout: float | None = None) -> None:
            self.begun = True
            shutdown(timeout=timeout)

        engine_client.shutdown = begin


class DrainMiddleware:
    """Refuses what comes under /v1 once the server drains."""

    def __init__(self, app: Any, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if not (self.drain.begun and scope["type"] == "http" and scope["path"].startswith("/v1")):
            return await self.app(scope, receive, send)
        from fastapi.responses import JSONResponse
        from vllm.entrypoints.serve import create_error_response

        refused = create_error_response(
            "the server is shutting down", "ServiceUnavailableError", HTTPStatus.SERVICE_UNAVAILABLE
        )
        headers = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
        response = JSONResponse(refused.model_dump(), refused.error.code, headers)
        return await response(scope, receive, send)
