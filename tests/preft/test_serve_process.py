"""vLLM's OpenAI-compatible server: the front process and the engine process each find the plugin by its entry point."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preft_cases import Case, Checker, prompt

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.slow]
NAMES = ["lora_p_0", "reft_p_0", "lora_all"]
PATIENCE = 500.0  # seconds until the server must be up


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read()
    return json.loads(text) if text else None


@pytest.fixture(scope="module")
def server(
    model_folder: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port = free_port()
    settings = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--served-model-name": "base",
        "--max-model-len": "128",
        "--max-num-seqs": "4",
        "--max-num-batched-tokens": "64",
        "--block-size": "32",
        "--max-loras": "2",
        "--max-cpu-loras": "8",
        "--distributed-executor-backend": "uni",
    }
    # Not the `vllm` command: in the CPU distribution it looks up a package name that is not installed.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, "--model", str(model_folder), "--enforce-eager"]
    command += [part for pair in settings.items() for part in pair]
    command += ["--enable-lora", "--lora-modules", *(f"{name}={folders[name]}" for name in NAMES)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            call(f"{url}/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server was not up after {PATIENCE} s:\n{log.read_text()[-3000:]}")


def test_adapters_are_models_and_their_phase_is_kept(server: str, checker: Checker) -> None:
    assert {model["id"] for model in call(f"{server}/v1/models")["data"]} == {"base", *NAMES}
    for name in [None, *NAMES]:
        case = Case(name, prompt(40, 3))
        body = {
            "model": name or "base",
            "prompt": list(case.prompt),
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        }
        [choice] = call(f"{server}/v1/completions", body)["choices"]
        assert choice["token_ids"] == checker.reference(case, 8), name
