"""`preft serve` over HTTP: one server for all tests, each with adapters of its own; the last one shuts it down.

The store it starts with holds an upload of an earlier server. Greedy tokens must equal the masked reference throughout.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from preft_cases import CONFIGS, Case, Checker, prompt, stir
from safetensors.torch import load_file, save_file
from server_process import KEY as API_KEY
from server_process import Server

from preft.adapters import Adapter, AdapterConfig
from preft.composition import compose
from preft.formats import save_adapter
from preft.reference import greedy_reference
from preft.serve.store import Store
from preft.vllm.sticky import KEY, generated_positions
from shared.history import History
from shared.interventions import Add, Intervention, save_interventions
from shared.models import Model
from shared.tokens import Message, Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
GIVEN = ["lora_p_0", "reft_p_0", "lora_all"]
LONG = 120  # tokens: long enough to do something while they are generated
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def server(
    model_folder: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    with Store(root / "store") as earlier:
        staged = earlier.stage()
        shutil.copytree(folders["lora_p_3"], staged, dirs_exist_ok=True)
        earlier.set_current("kept", earlier.number(staged), 2)
    arguments = [str(model_folder), "--adapters", *(f"{name}={folders[name]}" for name in GIVEN)]
    settings = {
        "--store": str(root / "store"),
        "--allow-local-paths": str(folders["lora_p_0"].parent),
        "--max-upload-mb": "2",
        "--max-loras": "2",
        "--served-model-name": "base",
        "--max-model-len": "256",
        "--max-num-seqs": "4",
        "--block-size": "32",
        "--drain-seconds": "60",
    }
    server = Server(arguments + [part for pair in settings.items() for part in pair], root / "log.txt")
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def other_all(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Path]:
    """A second adapter of phase all."""
    adapter = stir(Adapter.create(model.hf, CONFIGS["lora_all"], seed=50), seed=51)
    return adapter, save_adapter(adapter, tmp_path_factory.mktemp("other") / "lora_all")


@pytest.fixture
def up(server: Server, folders: dict[str, Path]) -> Iterator[str]:
    """An uploaded adapter, `lora_p_1`, for one test."""
    assert server.put("up", folders["lora_p_1"]).status_code == 201
    yield "up"
    server.delete("up")


def names(server: Server) -> set[str]:
    return {row["id"] for row in server.get("/v1/adapters")["data"]}


def test_adapters_are_models_and_their_phase_is_kept(server: Server, checker: Checker) -> None:
    assert {"base", "kept", *GIVEN} <= {model["id"] for model in server.get("/v1/models")["data"]}
    for name in [None, *GIVEN]:
        case = Case(name, prompt(40, 3))
        assert server.tokens(name or "base", case.prompt, 8) == checker.reference(case, 8), name


def test_a_restart_serves_the_uploads_of_before(server: Server, checker: Checker) -> None:
    row = server.get("/v1/adapters/kept")
    assert (row["version"], row["stored"]) == (2, True)
    case = Case("lora_p_3", prompt(33, 4))
    assert server.tokens("kept", case.prompt, 8) == checker.reference(case, 8)


def test_the_metrics_count_every_token_once(server: Server, folders: dict[str, Path]) -> None:
    """A request of n prompt tokens and m new ones computes n and m - 1: the last one is not fed back."""
    before = server.metrics()
    assert before['preft_adapters{state="registered"}'] == len(names(server))
    server.put("counted", folders["lora_p_1"])
    server.tokens("base", prompt(21, 5), 4)
    server.tokens("lora_p_0", prompt(40, 6), 6)
    server.tokens("lora_all", prompt(35, 7), 5)
    server.tokens("lora_p_0", prompt(40, 6), 6)  # one block of 32 is cached
    after = server.metrics()
    found = {name: after[name] - before.get(name, 0) for name in after}
    assert found['preft_tokens_total{adapted="true",phase="prefill"}'] == 40 + 35 + 8
    assert found['preft_tokens_total{adapted="true",phase="decode"}'] == 4
    assert found['preft_tokens_total{adapted="false",phase="prefill"}'] == 21
    assert found['preft_tokens_total{adapted="false",phase="decode"}'] == 3 + 5 + 5
    assert found['preft_adapter_tokens_total{adapter="lora_p_0",phase="prefill"}'] == 48
    assert found['preft_adapter_tokens_total{adapter="lora_all",phase="decode"}'] == 4
    assert found['preft_prompt_tokens_cached_total{adapter="true"}'] == 32
    assert after["preft_slots"] == 2
    assert after['preft_adapters{state="in_slot"}'] == 2
    assert found['preft_adapters{state="registered"}'] == 1
    assert found["preft_adapter_load_seconds_count"] == 1
    server.delete("counted")


def test_an_upload_is_served_at_once(
    server: Server, checker: Checker, folders: dict[str, Path], up: str
) -> None:
    row = server.get(f"/v1/adapters/{up}")
    assert (row["phase"], row["method"], row["rank"], row["version"]) == ("prefill", "lora", 8, 1)
    case = Case("lora_p_1", prompt(40, 8))
    assert server.tokens(up, case.prompt, 8) == checker.reference(case, 8)
    assert up in {model["id"] for model in server.get("/v1/models")["data"]}
    again = server.put(up, folders["lora_p_1"])
    assert again.status_code == 409
    assert "PUT replaces it" in again.json()["error"]["message"]


def spoil_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return spoil


def spoil_tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in tensors if "q_proj" in name and name.endswith("_A.weight")))
        save_file(tensors, folder / WEIGHTS)

    return spoil


BAD = {
    "missing tensor": (spoil_tensors(lambda tensors, name: tensors.pop(name)), "is missing"),
    "wrong shape": (
        spoil_tensors(lambda tensors, name: tensors.update({name: tensors[name][:, :-1].contiguous()})),
        "has shape",
    ),
    "not finite": (
        spoil_tensors(lambda tensors, name: tensors[name].fill_(float("nan"))),
        "not finite",
    ),
    "other base model": (
        spoil_config(lambda config: config["preft"].update(base_model_fingerprint="0" * 16)),
        "fingerprint",
    ),
    "rank too high": (spoil_config(lambda config: config.update(r=10**9)), "--max-lora-rank"),
    "no rank": (spoil_config(lambda config: config.pop("r")), "'r' is missing"),
    "expression": (
        spoil_config(lambda config: config.update(rank_pattern={"(a+)+b": 2})),
        "names its modules",
    ),
    "not safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"pickle" * 99), "is damaged"),
    "not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be used"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_adapter_is_refused_with_the_reason(
    server: Server, checker: Checker, folders: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    spoil, reason = BAD[fault]
    folder = tmp_path / "bad"
    shutil.copytree(folders["lora_p_0"], folder)
    spoil(folder)
    before = names(server)
    for response in (server.put("bad", folder), server.put("lora_p_0", folder, replace=True)):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, 400)
        assert reason in error["message"]
    assert names(server) == before
    case = Case("lora_p_0", prompt(40, 3))
    assert server.tokens("lora_p_0", case.prompt, 8) == checker.reference(case, 8)


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "..", ".hidden", "a b", "", "alice+calm:0.5", "x" * 97, "base"]
)
def test_a_bad_name_is_refused(server: Server, folders: dict[str, Path], name: str) -> None:
    before = names(server)
    response = server.put(name, folders["lora_p_1"])
    assert response.status_code == (409 if name == "base" else 400)
    assert names(server) == before


def test_files_of_other_names_are_refused(server: Server, folders: dict[str, Path]) -> None:
    response = server.put("up2", folders["lora_p_1"], adapter_config="../../adapter_config.json")
    assert response.status_code == 400
    assert "field `files` must bring" in response.json()["error"]["message"]


def test_an_upload_beyond_the_limit_is_refused(
    server: Server, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["lora_p_1"], tmp_path / "large")
    (tmp_path / "large" / WEIGHTS).write_bytes(bytes(3 * 2**20))
    response = server.put("large", tmp_path / "large")
    assert response.status_code == 413
    assert "2 MiB" in response.json()["error"]["message"]
    assert "large" not in names(server)


def test_local_paths_are_those_the_operator_opened(
    server: Server, checker: Checker, folders: dict[str, Path], other_all: tuple[Adapter, Path]
) -> None:
    outside, inside = str(other_all[1]), str(folders["reft_p_1"])
    post = server.client.post
    assert post("/v1/adapters", json={"name": "local", "path": outside}).status_code == 403
    assert post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": outside}).status_code == 403
    assert post("/v1/adapters", json={"name": "local", "path": inside}).status_code == 201
    assert post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": inside}).status_code == 200
    case = Case("reft_p_1", prompt(40, 9))
    for name in ("local", "v"):
        assert server.tokens(name, case.prompt, 8) == checker.reference(case, 8)
    assert post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 200
    assert server.delete("local").status_code == 200
    assert not {"local", "v"} & names(server)


def test_replacing_disturbs_no_running_request(
    server: Server, checker: Checker, folders: dict[str, Path], up: str
) -> None:
    """The old version serves its request to the end, the new one all that come after."""
    old, new = Case("lora_p_1", prompt(50, 10)), Case("lora_p_2", prompt(50, 10))
    stream = server.stream(up, old.prompt, LONG)
    tokens = [*next(stream)]
    assert server.put(up, folders["lora_p_2"], replace=True).status_code == 200
    assert server.tokens(up, new.prompt, 8) == checker.reference(new, 8)
    for part in stream:
        tokens += part
    assert tokens == checker.reference(old, LONG)
    row = server.get(f"/v1/adapters/{up}")
    assert (row["version"], row["requests_in_flight"], row["requests_under_older_versions"]) == (2, 0, 0)


def test_two_versions_of_one_name_decode_in_one_batch(
    server: Server, checker: Checker, folders: dict[str, Path], other_all: tuple[Adapter, Path]
) -> None:
    """Phase all: the old version must stay in its slot until its request ends."""
    adapter, folder = other_all
    checker.adapters["other_all"] = adapter
    server.put("two", folders["lora_all"])
    old, new = Case("lora_all", prompt(45, 11)), Case("other_all", prompt(46, 12))
    stream = server.stream("two", old.prompt, LONG)
    tokens = [*next(stream)]
    assert server.put("two", folder, replace=True).status_code == 200
    assert server.tokens("two", new.prompt, 24) == checker.reference(new, 24)
    for part in stream:
        tokens += part
    assert tokens == checker.reference(old, LONG)
    server.delete("two")


def test_deleting_disturbs_no_running_request(server: Server, checker: Checker, up: str) -> None:
    case = Case("lora_p_1", prompt(51, 13))
    stream = server.stream(up, case.prompt, LONG)
    tokens = [*next(stream)]
    assert server.delete(up).json() == {"id": up, "object": "adapter", "deleted": True}
    assert server.delete(up).status_code == 404
    missing = server.client.post("/v1/completions", json={"model": up, "prompt": [5, 6], "max_tokens": 1})
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "NotFoundError"
    for part in stream:
        tokens += part
    assert tokens == checker.reference(case, LONG)


def test_a_sum_follows_its_terms(
    server: Server, checker: Checker, adapters: dict[str, Adapter], folders: dict[str, Path]
) -> None:
    case = {}
    for kind in ("lora_p_1", "lora_p_2"):
        checker.adapters[f"sum {kind}"] = compose([(adapters[kind], 0.5), (adapters["lora_p_0"], 1.0)])
        case[kind] = Case(f"sum {kind}", prompt(47, 15))
        server.put("term", folders[kind], replace=True)
        for _ in range(2):
            assert server.tokens("term:0.5+lora_p_0", case[kind].prompt, 8) == checker.reference(
                case[kind], 8
            )
    assert checker.reference(case["lora_p_1"], 8) != checker.reference(case["lora_p_2"], 8)
    server.delete("term")
    assert not {"term", "term:0.5+lora_p_0"} & names(server)
    for name, status in [("term:0.5+lora_p_0", 404), ("lora_p_0:x", 404), ("+".join(["lora_p_0"] * 5), 400)]:
        body = {"model": name, "prompt": [5, 6], "max_tokens": 1}
        assert server.client.post("/v1/completions", json=body).status_code == status, name


def test_a_chat_under_a_sticky_adapter(server: Server, model: Model, tmp_path: Path) -> None:
    """The server finds the earlier answers; what a client says wrongly of them is a bad request."""
    config = AdapterConfig(rank=4, history=History.STICKY)
    adapter = stir(Adapter.create(model.hf, config, seed=60), seed=61)
    server.put("sticky", save_adapter(adapter, tmp_path / "sticky"))
    chat = [
        Message(role="user", content="Where is Boston?"),
        Message(role="assistant", content="In Massachusetts, as far as I know."),
        Message(role="user", content="And Austin?"),
    ]
    body = {"model": "sticky", "messages": chat, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    ids, flat = answer["prompt_token_ids"], generated_positions(model.tokenizer, chat)
    references = [
        greedy_reference(model.hf, adapter, ids, 8, tuple(model.eos_token_ids), generated=spans).tokens
        for spans in [tuple(zip(flat[::2], flat[1::2])), ()]
    ]
    assert answer["choices"][0]["token_ids"] == references[0] != references[1]
    wrong = server.client.post("/v1/chat/completions", json=body | {"vllm_xargs": {KEY: [5, 3]}})
    assert wrong.status_code == 400
    assert "must be positions start, end" in wrong.json()["error"]["message"]
    server.delete("sticky")


def test_the_openai_client_is_served(
    server: Server, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import NotFoundError, OpenAI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=API_KEY) as client:
        assert {"base", "lora_p_0"} <= {model.id for model in client.models.list()}
        case = Case("lora_p_0", prompt(40, 3))
        answer = client.completions.create(
            model="lora_p_0",
            prompt=list(case.prompt),
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert answer.choices[0].model_dump()["token_ids"] == checker.reference(case, 8)
        with pytest.raises(NotFoundError, match="nobody"):
            client.completions.create(model="nobody", prompt="x")


def test_a_sum_of_adapters_is_served_by_its_name(
    server: Server, checker: Checker, adapters: dict[str, Adapter], folders: dict[str, Path], tmp_path: Path
) -> None:
    both = compose([(adapters["lora_p_0"], 0.5), (adapters["lora_p_3"], 1.0)])
    case = Case(None, prompt(44, 15))
    expected = greedy_reference(checker.model.hf, both, list(case.prompt), 8).tokens
    assert server.tokens("lora_p_0:0.5+kept", case.prompt, 8) == expected
    folder = both.save(tmp_path / "both", fingerprint=checker.model.fingerprint)
    assert server.put("both", folder).status_code == 201
    assert server.tokens("both", case.prompt, 8) == expected
    assert server.delete("both").status_code == 200


def test_interventions_and_two_part_compositions_are_served(
    server: Server, checker: Checker, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    parted = compose([(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)])
    folder = parted.save(tmp_path / "parted", fingerprint=checker.model.fingerprint)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*") if path.is_file()}
    assert len(files) == 5
    assert upload(server, "parted", files).status_code == 201
    case = Case(None, prompt(45, 16))
    expected = greedy_reference(checker.model.hf, parted, list(case.prompt), 12).tokens
    assert server.tokens("parted", case.prompt, 12) == expected
    edits: list[Intervention] = [Add("blocks.1.output", 3 * torch.arange(128).sin(), phase=Phase.PREFILL)]
    calm = save_interventions(tmp_path / "calm", edits, checker.model)
    assert upload(server, "calm", {path.name: path for path in calm.iterdir()}).status_code == 201
    row = server.get("/v1/adapters/calm")
    assert (row["phase"], row["rank"]) == ("prefill", 1)
    assert server.tokens("calm", case.prompt, 12) != server.tokens("base", case.prompt, 12)
    for name in ("calm", "parted"):
        assert server.delete(name).status_code == 200


def upload(server: Server, name: str, files: dict[str, Path]) -> httpx.Response:
    parts = [("files", (file, path.read_bytes())) for file, path in files.items()]
    return server.client.post("/v1/adapters", data={"name": name}, files=parts)


def test_the_key_protects_everything_but_the_probes(server: Server) -> None:
    with httpx.Client(base_url=server.client.base_url, trust_env=False) as stranger:
        assert stranger.get("/v1/adapters").status_code == 401
        assert stranger.delete("/v1/adapters/kept").status_code == 401
        assert stranger.post("/v1/completions", json={}).status_code == 401
        assert stranger.post("/adapters", json={"name": "up", "src": "/"}).status_code == 401
        assert stranger.delete("/adapters/kept").status_code == 401
        assert stranger.post("/invocations", json={"model": "base", "prompt": "x"}).status_code == 401
        assert stranger.post("/tokenize", json={"prompt": "x"}).status_code == 401
        assert stranger.get("/health").status_code == 200
        assert "preft_slots 2.0" in stranger.get("/metrics").text
    assert "kept" in names(server)


def test_sigterm_lets_running_requests_finish(server: Server, checker: Checker) -> None:
    case = Case("lora_p_0", prompt(52, 14))
    stream = server.stream("lora_p_0", case.prompt, LONG)
    tokens = [*next(stream)]
    server.process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        refusal = pool.submit(until_refused, server)
        for part in stream:
            tokens += part
    assert refusal.result().headers["Retry-After"]
    assert tokens == checker.reference(case, LONG)
    assert server.process.wait(timeout=60) == 0


def until_refused(server: Server) -> httpx.Response:
    """Ask until the server refuses, with status 503: as long as a request runs it must listen."""
    while True:
        with httpx.Client(
            base_url=server.client.base_url, headers=server.client.headers, trust_env=False
        ) as new:
            response = new.get("/v1/models")
        if response.status_code == 503:
            return response
        assert response.status_code == 200
        time.sleep(0.02)
