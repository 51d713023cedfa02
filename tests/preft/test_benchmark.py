"""The serving benchmark's own arithmetic: traces, popularity, paired ratios, the line of JSON."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _preft_models
import _preft_plan as plan
import _results
import preft_serving
from _preft_engine import Measured
from _preft_models import SHAPES
from _preft_report import rows, summary
from _preft_trace import popularity, random_trace, read_trace

from preft.adapter_files import WEIGHTS_FILE
from preft.vllm.identity import CONFIG_FILE
from shared.errors import UserError
from shared.serialize import read_json, write_json

KEYS = (
    "lora_p_over_base", "reft_p_over_base", "lora_p_over_lora", "lora_p_over_base_long_prompt",
    "base_with_plugin_over_stock", "rank256_over_rank8", "slots8_over_resident", "decode_step_ratio",
)  # fmt: skip


def record(scene: str, turn: int, arm: str, speed: float) -> dict[str, Any]:
    latencies = dict.fromkeys(("ttft_ms", "ttft_p99_ms", "itl_ms", "itl_p99_ms"), 1.0)
    return {
        "scene": scene,
        "round": turn,
        "arm": arm,
        "tokens_per_s": speed,
        "decode_step_ms": 1e3 / speed,
    } | latencies


def test_ratios_pair_the_rounds() -> None:
    """The machine halves its speed in round 1: the ratio of medians would not be 0.9, that of the pairs is."""
    records = [
        record("short", 0, "base", 100),
        record("short", 0, "lora_p", 90),
        record("short", 1, "lora_p", 45),
    ]
    records += [
        record("short", 1, "base", 50),
        record("short", 2, "base", 80),
        record("short", 2, "lora_p", 72),
    ]
    records += [record("short", 3, "base", 1000)]  # cut before its partner
    found = summary(plan.RATIOS, records)
    assert found["lora_p_over_base"] == pytest.approx(0.9)
    assert found["lora_p_over_base_ci"] == pytest.approx([0.9, 0.9])
    assert found["decode_step_ratio"] == pytest.approx(1 / 0.9, abs=1e-4)
    [row] = [row for row in rows(plan.RATIOS, records) if row["figure"] == "lora_p_over_base"]
    assert (row["note"], row["rounds"]) == ("at least 0.97: not reached", 3)


def test_the_full_plan_gives_every_key_and_names_only_what_exists() -> None:
    records = [record(scene.name, 0, arm, 100) for scene in plan.SCENES for arm in scene.arms]
    found = summary(plan.RATIOS, records)
    assert set(KEYS) <= set(found)
    assert {f"{key}_ci" for key in KEYS} <= set(found)
    assert json.loads(json.dumps(found)) == found
    assert {plan.ARMS[arm].engine for scene in plan.SCENES for arm in scene.arms} == set(plan.ENGINES)


def test_every_round_has_all_fast_arms_and_the_order_rotates() -> None:
    scene = plan.SCENES[0]
    slow = {arm for arm, _ in scene.every}
    first = {scene.arms_of(turn)[0] for turn in range(2 * len(scene.arms))}
    assert set(scene.arms_of(0)) == set(scene.arms)
    assert all(set(scene.arms_of(turn)) >= set(scene.arms) - slow for turn in range(6))
    assert first >= set(scene.arms) - slow


def test_popularity() -> None:
    assert popularity("distinct", 4, 6, turn=1) == [4, 5, 0, 1]  # goes on where round 0 ended
    uniform, zipf = (popularity(kind, 4000, 8, turn=0) for kind in ("uniform", "zipf"))
    assert set(uniform) == set(zipf) == set(range(8))
    assert uniform.count(0) < 700 < 1200 < zipf.count(0)


def test_random_trace() -> None:
    items = random_trace(3, 5, 7, [2, 0, 1], vocabulary=50, seed=0)
    assert [(len(item.prompt), item.new_tokens, item.adapter, item.at) for item in items] == [
        (5, 7, 2, 0.0), (5, 7, 0, 0.0), (5, 7, 1, 0.0)
    ]  # fmt: skip
    assert items == random_trace(3, 5, 7, [2, 0, 1], vocabulary=50, seed=0)
    assert items[0].prompt != items[1].prompt


class TestTraceFiles:
    def write(self, path: Path, *lines: dict[str, Any]) -> Path:
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def test_timed_traces_share_the_blocks_their_hashes_name(self, tmp_path: Path) -> None:
        line = {"timestamp": 2.5, "input_length": 20, "output_length": 3, "hash_ids": [4, 9]}
        path = self.write(tmp_path / "t.jsonl", line, line | {"timestamp": 1.0, "hash_ids": [4, 8]})
        second, first = read_trace(path, vocabulary=100)[::-1]
        assert (first.at, second.at, first.new_tokens) == (1.0, 2.5, 3)
        assert len(first.prompt) == len(second.prompt) == 20
        assert first.prompt[:16] == second.prompt[:16]
        assert first.prompt[16:] != second.prompt[16:]

    def test_custom_data_sets(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "c.jsonl", {"prompt": "Hall\u00f6", "output_tokens": 4})
        [item] = read_trace(path, vocabulary=100)
        assert (len(item.prompt), item.new_tokens) == (6, 4)  # one token a UTF-8 byte
        assert all(2 <= token < 100 for token in item.prompt)

    @pytest.mark.parametrize(
        "line",
        [
            {"prompt": "no output"},
            {"timestamp": 0, "input_length": 9},
            {"timestamp": 0, "input_length": 40, "output_length": 1, "hash_ids": [1]},
            {"prompt": "", "output_tokens": 4},
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: dict[str, Any]) -> None:
        path = self.write(tmp_path / "bad.jsonl", {"prompt": "fine", "output_tokens": 1}, line)
        with pytest.raises(UserError, match="line 2"):
            read_trace(path, vocabulary=100)


class FakeEngine:
    """An engine that answers at once; prefill-only arms at 0.95 of the base's speed."""

    def __init__(self, config: Any) -> None:
        assert config.slots <= max(config.cpu_adapters, config.slots)
        self.config = config

    def ready(self) -> None: ...

    def close(self) -> None: ...

    def replay(self, order: Any) -> Any:
        assert all(item.adapter < len(order.folders) for item in order.items if order.folders)
        assert all(len(item.prompt) + item.new_tokens <= self.config.max_length for item in order.items)
        speed = 95.0 if order.folders else 100.0
        generated = sum(item.new_tokens for item in order.items)
        return Measured(generated / speed, generated, speed, 1, 2, 3, 4, 1e3 / speed, 5, ["x"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The whole command over `FakeEngine`: every scene, every file; returns its last line and its result files."""

    def command(*arguments: str) -> tuple[dict[str, Any], dict[str, Path]]:
        monkeypatch.setattr(preft_serving, "EngineProcess", FakeEngine)
        monkeypatch.setattr(preft_serving, "ROOT", tmp_path)
        monkeypatch.setattr(_preft_models, "save_adapter", lambda _, folder, **__: fake_adapter(folder))
        monkeypatch.setattr(_preft_models, "_random_adapter", lambda *_, **__: None)
        monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["preft_serving.py", *arguments])
        write_json(tmp_path / "25m" / "config.json", SHAPES["25m"].config)  # no weights are made then
        lines = io.StringIO()
        with redirect_stdout(lines):
            preft_serving.main()
        files = {path.suffix: path for path in (tmp_path / "results").iterdir()}
        return json.loads(lines.getvalue().splitlines()[-1]), files

    return command


def fake_adapter(folder: Path) -> None:
    write_json(folder / CONFIG_FILE, {"preft": {"phase": "prefill"}})
    (folder / WEIGHTS_FILE).write_bytes(b"1" * 100)


def test_the_whole_command(run: Any) -> None:
    found, files = run("--minutes", "0.001")
    assert found["lora_p_over_base"] == pytest.approx(0.95)
    assert found["slots8_over_resident"] == pytest.approx(1.0)
    assert set(KEYS) <= set(found)
    assert set(files) == {".json", ".md", ".png"}
    raw = read_json(files[".json"])
    assert len(raw["raw"]) == sum(len(scene.arms) for scene in plan.SCENES)
    assert "lora_p_over_lora" in files[".md"].read_text()


def test_curves_and_traces(run: Any, tmp_path: Path) -> None:
    found, _ = run("--minutes", "0.001", "--curve", "16", "64", "--quick")
    assert {"lora_p_over_lora_own@16", "lora_p_over_base@64"} <= set(found)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 700, "output_length": 9}')
    found, files = run("--minutes", "0.001", "--scenes", "short", "--trace", str(trace), "--cold")
    assert {record["generated"] for record in read_json(files[".json"])["raw"]} == {9}


def test_real_shapes_are_refused_without_a_gpu(run: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a GPU"):
        run("--model", "llama-3.1-8b")
