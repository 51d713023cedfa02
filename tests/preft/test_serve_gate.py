"""What stands before every route of `preft serve`, and the page of metrics while the engine does not answer."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from preft.serve import prometheus
from preft.serve.catalog import Catalog
from preft.serve.check import AdapterCheck
from preft.serve.gate import Drain, Gate
from preft.serve.prometheus import EngineCollector
from preft.serve.store import Store

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]
CLOSED = ["/v1/models", "/invocations", "/adapters", "/adapters/x", "/tokenize", "/health/x", "/healthy", "/"]
PROBES = ["/health", "/ping", "/metrics", "/metrics/", "/version"]


async def passes(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers everything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(gate: Gate, path: str, key: str | None = None) -> httpx.Response:
    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
            return await client.post(path, headers={"Authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(one())


@pytest.mark.parametrize("path", CLOSED)
def test_every_route_asks_for_the_key_and_drains(path: str) -> None:
    drain = Drain()
    gate = Gate(passes, drain, "right")
    assert ask(gate, path).status_code == ask(gate, path, "wrong").status_code == 401
    assert "key" in ask(gate, path).json()["error"]["message"]
    assert ask(gate, path, "right").status_code == ask(Gate(passes, drain, None), path).status_code == 200
    drain.begun = True
    refused = ask(gate, path, "right")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert ask(gate, path).status_code == 401


@pytest.mark.parametrize("path", PROBES)
def test_probes_are_open_to_the_end(path: str) -> None:
    drain = Drain()
    drain.begun = True
    assert ask(Gate(passes, drain, "right"), path).status_code == 200


def test_a_socket_asks_for_the_key() -> None:
    sent: list[Any] = []

    async def play() -> None:
        async def receive() -> Any:
            raise AssertionError("what it says is not read")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "extensions": {}}
        await Gate(passes, Drain(), "right")(scope, receive, send)

    asyncio.run(play())
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("fault", ["slow", "dies", "busy loop"])
def test_the_page_stands_when_the_engine_does_not_answer(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prometheus, "PATIENCE", 0.02)
    monkeypatch.setattr(prometheus, "KEPT", 0.01)
    calls: list[asyncio.Task[Any] | None] = []

    async def call(method: str) -> Any:
        calls.append(asyncio.current_task())
        if fault == "dies":
            raise RuntimeError("the engine is dead")
        await asyncio.Event().wait()

    engine = SimpleNamespace(errored=False, engine_core=SimpleNamespace(call_utility_async=call))
    models = SimpleNamespace(lora_requests={})

    async def play(store: Store) -> list[Any]:
        collector = EngineCollector(Catalog(models, engine, AdapterCheck(None, None, 16), store), Drain())
        page = asyncio.get_running_loop().run_in_executor(None, lambda: list(collector.collect()))
        if fault == "busy loop":
            time.sleep(0.2)
        rows = await page
        assert await asyncio.wait_for(collector.fresh(), 5) == collector._known
        return rows

    with Store(tmp_path / "store") as store:
        rows = asyncio.run(play(store))
    assert "preft_slots" in {row.name for row in rows}
    assert all(task is None or task.done() for task in calls), "no call is left behind"
    assert "did not give new ones" in caplog.text
