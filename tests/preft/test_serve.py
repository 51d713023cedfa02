"""The parts of `preft serve` that need no server: the store, the options, the life of a retired version, the counts."""

import asyncio
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from preft.cli import main
from preft.serve import catalog as catalog_module
from preft.serve.catalog import Catalog, Refusal
from preft.serve.check import AdapterCheck, bare_model
from preft.serve.command import adapter_folders, engine_rank
from preft.serve.guard import allowed_folder
from preft.serve.routes import row
from preft.serve.store import INDEX, Store
from preft.vllm import identity, metrics
from preft.vllm.mapping import KINDS, layout, map_step
from preft.vllm.metrics import DECODE, OTHERS, PREFILL, SchedulerCounts, Slots, Snapshot, WorkerCounts
from preft.vllm.scheduling import adapter_registry
from shared.errors import UserError
from shared.models import Model, ModelConfig
from shared.tokens import Phase

pytestmark = pytest.mark.xdist_group(__name__)


def stored(store: Store, name: str, version: int, text: str = "") -> Path:
    staged = store.stage()
    (staged / "file").write_text(text)
    folder = store.number(staged)
    store.set_current(name, folder, version)
    return folder


def test_a_store_comes_back_as_it_was_left(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        old, new = stored(store, "a", 1, "old"), stored(store, "a", 2, "new")
        stored(store, "b", 1)
        store.forget("b")
        assert old.is_dir(), "a request may still need a replaced version"
    with Store(tmp_path / "store") as again:
        assert {name: (row.folder, row.version) for name, row in again.current.items()} == {"a": (new, 2)}
        assert (new / "file").read_text() == "new"
        assert sorted(path.name for path in again.folder.iterdir() if path.is_dir()) == [new.name]


def test_a_version_number_is_never_used_again(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        first = stored(store, "a", 1)
        store.forget("a")
        store.discard(first)
    with Store(tmp_path / "store") as again:
        assert stored(again, "a", 1).name > first.name


def test_a_crash_before_the_index_leaves_nothing_behind(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        store.stage()
        store.number(store.stage())
    with Store(tmp_path / "store") as again:
        assert not again.current
        assert not [path for path in again.folder.iterdir() if path.is_dir()]


def test_a_store_serves_one_server_and_only_a_store_is_one(tmp_path: Path) -> None:
    with Store(tmp_path / "store"):
        with pytest.raises(UserError, match="another server"):
            Store(tmp_path / "store")
    (tmp_path / "mine" / "000001").mkdir(parents=True)
    with pytest.raises(UserError, match="folder of its own"):
        Store(tmp_path / "mine")
    assert (tmp_path / "mine" / "000001").is_dir()


def test_discarding_leaves_folders_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    with Store(tmp_path / "store") as store:
        store.discard(tmp_path / "given")
    assert (tmp_path / "given").is_dir()


def adapter_folder(path: Path, rank: int = 8) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return path


def test_adapters_are_named_or_found_in_a_folder(tmp_path: Path) -> None:
    a, b = adapter_folder(tmp_path / "users" / "a"), adapter_folder(tmp_path / "users" / "b")
    assert adapter_folders([str(tmp_path / "users"), f"c={a}"]) == {"a": a, "b": b, "c": a}
    assert adapter_folders([str(a)]) == {"a": a}
    for given, reason in [
        (["x=" + str(tmp_path)], "no adapter_config.json"),
        ([str(tmp_path)], "neither an adapter"),
        ([f"a/b={a}"], "no name"),
        ([str(a), f"a={b}"], "twice"),
    ]:
        with pytest.raises(UserError, match=reason):
            adapter_folders(given)


def test_the_engine_has_room_for_the_highest_rank(tmp_path: Path) -> None:
    a, b = adapter_folder(tmp_path / "a", 8), adapter_folder(tmp_path / "b", 33)
    assert engine_rank(None, {}) == 16
    assert engine_rank(None, {"a": a}) == 16
    assert engine_rank(None, {"a": a, "b": b}) == 64
    assert engine_rank(100, {"a": a}) == 128
    with pytest.raises(UserError, match="highest that vLLM serves"):
        engine_rank(513, {})


def test_a_bad_option_ends_the_command_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tinyworld", "--adapters", f"a={tmp_path}"]) == 2
    assert "no adapter_config.json there" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "tinyworld", "--port", port, "--store", str(tmp_path / "store")]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_the_check_needs_no_weights_of_the_model(
    model: Model, model_folder: Path, folders: dict[str, Path]
) -> None:
    hf = bare_model(ModelConfig(str(model_folder)))
    assert all(parameter.device.type == "meta" for parameter in hf.parameters())
    check = AdapterCheck(hf, model.fingerprint, 16)
    for name, folder in folders.items():
        checked = check(folder)
        assert checked.identity.method == ("lora" if "lora" in name else checked.identity.method)
        assert checked.rank in (2, 4, 8)


def test_local_paths_lie_below_the_open_folder(tmp_path: Path) -> None:
    (tmp_path / "open" / "a").mkdir(parents=True)
    (tmp_path / "open" / "link").symlink_to(tmp_path)
    root = tmp_path / "open"
    assert allowed_folder(str(root / "a"), root) == root / "a"
    for path in (str(tmp_path), str(root / ".." / "x"), str(root / "link"), "hub/name"):
        with pytest.raises(Refusal, match="outside"):
            allowed_folder(path, root)
    with pytest.raises(Refusal, match="--allow-local-paths"):
        allowed_folder(str(root / "a"), None)


class Engine:
    """Stands for AsyncLLM: its table of unfinished requests, and what was asked of it."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})
        self.loaded: set[int] = set()
        self.refuses = ""

    async def add_lora(self, request: Any) -> bool:
        if self.refuses:
            raise Exception(f"Call to add_lora method failed: {self.refuses}")
        self.loaded.add(request.lora_int_id)
        return True

    async def remove_lora(self, number: int) -> bool:
        self.loaded.discard(number)
        return True

    def run(self, name: str, request: Any, prefilling: bool) -> None:
        self.output_processor.request_states[name] = SimpleNamespace(
            lora_request=request, is_prefilling=prefilling
        )


class Models:
    """Stands for OpenAIServingModels."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.lora_resolver_lock: Any = defaultdict(asyncio.Lock)
        self._count = 0
        self.lora_id_counter = SimpleNamespace(inc=self._inc)

    def _inc(self, by: int) -> int:
        self._count += by
        return self._count

    def is_base_model(self, name: str) -> bool:
        return name == "base"


@pytest.fixture
def small(
    plugin: None, model: Model, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Catalog]:
    """A catalog over stand-ins for vLLM's engine and table, with a short grace."""
    monkeypatch.setattr(catalog_module, "GRACE", 0.02)
    monkeypatch.setattr(catalog_module, "POLL", 0.005)
    check = AdapterCheck(bare_model(ModelConfig(str(model_folder))), model.fingerprint, 16)
    with Store(tmp_path / "store") as store:
        yield Catalog(Models(), Engine(), check, store)


async def upload(small: Catalog, name: str, folder: Path, replace: bool = True) -> Any:
    staged = small.store.stage()
    for path in folder.iterdir():
        (staged / path.name).write_bytes(path.read_bytes())
    await small.put(name, staged, replace)
    return small.models.lora_requests[name]


@pytest.mark.parametrize(
    ("name", "waits_for_decoding"), [("lora_p_0", False), ("reft_p_0", False), ("lora_all", True)]
)
def test_a_version_lives_as_long_as_a_request_needs_it(
    small: Catalog, folders: dict[str, Path], name: str, waits_for_decoding: bool
) -> None:
    async def play() -> None:
        old = await upload(small, "x", folders[name])
        small.engine.run("one", old, prefilling=True)
        new = await upload(small, "x", folders["lora_p_1"])
        assert small.models.lora_requests["x"] is new
        await asyncio.sleep(0.05)
        assert small.engine.loaded == {old.lora_int_id, new.lora_int_id}
        small.engine.run("one", old, prefilling=False)
        await asyncio.sleep(0.05)
        assert (old.lora_int_id in small.engine.loaded) == waits_for_decoding
        assert Path(old.lora_path).is_dir(), "a preempted request computes its prompt anew"
        small.engine.output_processor.request_states.clear()
        await asyncio.sleep(0.1)
        assert small.engine.loaded == {new.lora_int_id}
        assert not Path(old.lora_path).exists()
        assert not small.retiring
        assert Path(new.lora_path).is_dir()

    asyncio.run(play())


def test_what_the_engine_refuses_changes_nothing(small: Catalog, folders: dict[str, Path]) -> None:
    async def play() -> None:
        old = await upload(small, "x", folders["lora_p_0"])
        small.engine.refuses = "no site for it"
        with pytest.raises(Refusal, match="refused it: no site for it"):
            await upload(small, "x", folders["lora_p_1"])
        with pytest.raises(Refusal, match="PUT replaces it"):
            await upload(small, "x", folders["lora_p_1"], replace=False)
        assert small.models.lora_requests == {"x": old}
        assert [path.name for path in small.store.folder.iterdir() if path.is_dir()] == ["000001"]
        await small.remove("x")
        with pytest.raises(Refusal, match="there is no adapter"):
            await small.remove("x")
        assert "x" not in json.loads((small.store.folder / INDEX).read_text())["adapters"]

    asyncio.run(play())


def test_an_adapter_is_read_once_and_never_on_the_event_loop(
    small: Catalog, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    read = identity.content_digest

    def content_digest(folder: Path) -> str:
        threads.append(threading.get_ident())
        return read(folder)

    monkeypatch.setattr(identity, "content_digest", content_digest)

    async def play() -> None:
        lora = await upload(small, "x", folders["lora_p_0"])
        assert len(threads) == 1
        assert threading.get_ident() not in threads
        [(_, version)] = small.rows()
        empty = Snapshot(WorkerCounts(), SchedulerCounts(), Slots())
        assert row(lora, version, empty)["digest"] == read(folders["lora_p_0"])
        assert adapter_registry.resolve(lora).phase is Phase.PREFILL
        await small.start({"x": small.check(folders["lora_p_1"])})
        assert adapter_registry.known(lora).digest == read(folders["lora_p_1"])
        await small.remove("x")
        assert len(threads) == 2

    asyncio.run(play())


def test_a_folder_that_was_not_uploaded_is_not_removed(small: Catalog, folders: dict[str, Path]) -> None:
    """Not even one that a client named inside the store; and one that vanished can still be deleted."""
    from vllm.lora.request import LoRARequest

    async def play() -> None:
        kept = Path((await upload(small, "x", folders["lora_p_0"])).lora_path)
        small.models.lora_requests |= {
            "named": LoRARequest("named", 77, str(kept)),
            "gone": LoRARequest("gone", 78, str(kept.parent / "999999")),
        }
        empty = Snapshot(WorkerCounts(), SchedulerCounts(), Slots())
        assert [row(*both, empty)["phase"] for both in small.rows()] == ["prefill", None, None]
        for name in ("named", "gone"):
            await small.remove(name)
        await asyncio.sleep(0.2)
        assert not small.retiring
        assert kept.is_dir()

    asyncio.run(play())


def count(counts: WorkerCounts, *rows: tuple[int, str, int, int, int]) -> None:
    """Count a step whose requests are (adapter, phase, prompt, computed, scheduled)."""
    adapter_R, _, prompt_R, computed_R, scheduled_R = [np.array(column) for column in zip(*rows)]
    acts_RP = np.array([KINDS[Phase(row[1])] if row[0] else (False,) * 3 for row in rows])
    batch = layout(adapter_R[:, None] * acts_RP, prompt_R, {})
    step = map_step(batch, computed_R, scheduled_R, np.ones_like(prompt_R))
    counts.count({1: "p", 2: "all", 3: "d"}, adapter_R, acts_RP, step.count_RK)


def test_tokens_are_counted_by_phase_and_adapter() -> None:
    counts = WorkerCounts()
    count(
        counts,
        (1, "prefill", 10, 4, 6),  # the last chunk of a prompt
        (1, "prefill", 10, 4, 9),  # recomputed after preemption: six of the prompt, three generated
        (1, "prefill", 10, 12, 1),  # decodes
        (2, "all", 10, 8, 5),  # two of the prompt, three generated
        (3, "decode_boundary", 10, 8, 3),  # one plain, the boundary token, one generated
        (0, "all", 7, 0, 7),  # no adapter: its prompt, and a token
        (0, "all", 7, 7, 1),
    )
    assert counts.adapted == {PREFILL: 12 + 2 + 1, DECODE: 3 + 1}
    assert counts.plain == {PREFILL: 1 + 7, DECODE: 3 + 1 + 1}
    assert counts.by_adapter == {
        "p": {PREFILL: 12, DECODE: 0},
        "all": {PREFILL: 2, DECODE: 3},
        "d": {PREFILL: 1, DECODE: 1},
    }


def test_the_names_that_are_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_NAMED", 2)
    counts = WorkerCounts()
    count(counts, *((i, "prefill", 10, 0, 10) for i in (1, 2, 3)))
    assert set(counts.by_adapter) == {"p", "all", OTHERS}


def test_waits_begin_when_a_slot_is_missing_and_end_when_the_request_is_scheduled() -> None:
    def request(name: str, lora: Any, blocked: bool = False, stale: int = 0) -> Any:
        return SimpleNamespace(
            request_id=name, lora_request=lora, status=blocked, num_stale_output_tokens=stale
        )

    deferred = [
        request("waits", "an adapter"),
        request("plain", None),
        request("blocked", "an adapter", blocked=True),
        request("stale", "an adapter", stale=1),
    ]
    scheduler = SimpleNamespace(deferred_waiting=deferred, _is_blocked_waiting_status=bool)
    new = [SimpleNamespace(lora_request=lora, num_computed_tokens=n) for lora, n in (("x", 32), (None, 64))]
    counts = SchedulerCounts()
    counts.after_schedule(scheduler, SimpleNamespace(scheduled_new_reqs=new))
    assert (set(counts.waiting), counts.waits) == ({"waits"}, 0)
    scheduler.deferred_waiting = []
    counts.after_schedule(scheduler, SimpleNamespace(scheduled_new_reqs=[]))
    assert (counts.waiting, counts.waits) == ({}, 1)
    assert counts.wait_seconds > 0
    assert (counts.cached_adapted, counts.cached_plain) == (32, 64)
