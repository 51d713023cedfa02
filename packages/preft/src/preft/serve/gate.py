"""What comes before every route: the key, and once vLLM begins to drain, status 503 for new requests.

vLLM asks for its key under some prefixes only, and serves completions and the loading of adapters outside of them too
(/invocations, /adapters, /tokenize, ...). Here everything needs the key but `OPEN`, whatever routes there are.

vLLM's server answers SIGTERM by shutting its engine client down, which lets running requests finish for up to
`--shutdown-timeout` seconds; but it goes on accepting requests, whose generation it then aborts. A load balancer and
the OpenAI clients know what to do with 503 and Retry-After: try elsewhere, or again.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

RETRY_AFTER = 5  # seconds
OPEN = ("/health", "/ping", "/metrics", "/version")


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


class Gate:
    """ASGI middleware that lets requests pass to `OPEN`, and elsewhere those with the key (None: all) until the end."""

    def __init__(self, app: Any, drain: Drain, key: str | None) -> None:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        self.app, self.drain = app, drain
        self._has_key = AuthenticationMiddleware(app, [key]).verify_token if key else None

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        return await (self._refusal(scope) or self.app)(scope, receive, send)

    def _refusal(self, scope: Any) -> Any:
        """The response in place of the route's, or None."""
        from starlette.datastructures import Headers

        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS" or _is_open(scope):
            return None
        if self._has_key is not None and not self._has_key(Headers(scope=scope)):
            return _response("the key is missing or wrong", HTTPStatus.UNAUTHORIZED)
        if self.drain.begun:
            headers = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
            return _response("the server is shutting down", HTTPStatus.SERVICE_UNAVAILABLE, headers)
        return None


def _is_open(scope: Any) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.removesuffix("/") in OPEN


def _response(message: str, status: HTTPStatus, headers: dict[str, str] | None = None) -> Any:
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve import create_error_response

    refused = create_error_response(message, status.phrase.replace(" ", "") + "Error", status)
    return JSONResponse(refused.model_dump(), status, headers)
