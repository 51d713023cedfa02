"""`preft serve` as a process of its own, and a client that speaks HTTP to it without any of the project's code."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

KEY = "secret"
PATIENCE = 500.0  # seconds until the server must be up


class Server:
    """One server, and its client."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log, self.port = log, _free_port()
        command = [sys.executable, "-m", "preft", "serve", *arguments, "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PREFT_API_KEY": KEY},
            )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
            trust_env=False,
        )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"not up, status {self.process.poll()}:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=60)

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        response.raise_for_status()
        return response.json()

    def put(self, name: str, folder: Path, replace: bool = False, **names: str) -> httpx.Response:
        """Upload an adapter's two files; `names` changes what a file is called on the way."""
        files = [
            ("files", (names.get(path.stem, path.name), path.read_bytes()))
            for path in (folder / "adapter_config.json", folder / "adapter_model.safetensors")
        ]
        if replace:
            return self.client.put(f"/v1/adapters/{name}", files=files)
        return self.client.post("/v1/adapters", data={"name": name}, files=files)

    def delete(self, name: str) -> httpx.Response:
        return self.client.delete(f"/v1/adapters/{name}")

    def tokens(self, model: str, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        """Greedy tokens of one completion."""
        body = _body(model, prompt, max_tokens)
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    def stream(self, model: str, prompt: tuple[int, ...], max_tokens: int) -> Iterator[list[int]]:
        """The same, as they come."""
        body = _body(model, prompt, max_tokens) | {"stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or []

    def metrics(self) -> dict[str, float]:
        """The rows preft_* of the page of metrics, as `name{labels}` -> value."""
        time.sleep(0.6)  # the server keeps an answer of the engine for half a second
        rows = [line.rpartition(" ") for line in self.client.get("/metrics").text.splitlines()]
        return {name: float(value) for name, _, value in rows if name.startswith("preft_")}


def _body(model: str, prompt: tuple[int, ...], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
