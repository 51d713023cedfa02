"""`preft train`: sources of chats, options, faults named before any computing, a run that is killed and resumed."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from preft_cases import chats

from preft.adapters import AdapterConfig
from preft.cli import main
from preft.formats import read_adapter
from preft.options import add_options, from_options
from preft.train import TrainConfig
from preft.train.command import add_shared_arguments, hold_out, model_config
from preft.train.data import by_user, read_data
from shared.config import ConfigError
from shared.data import DataError
from shared.models import ModelConfig
from shared.serialize import read_json
from shared.tokens import Phase


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_sources_give_the_same_chats(tmp_path: Path) -> None:
    import datasets

    wanted = chats(3)
    pairs = [{"prompt": chat[0]["content"], "response": chat[1]["content"]} for chat in wanted]
    messages = [{"messages": chat, "id": i} for i, chat in enumerate(wanted)]
    named = [{"question": pair["prompt"], "answer": pair["response"]} for pair in pairs]
    datasets.Dataset.from_list(messages).save_to_disk(tmp_path / "one")
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs)})
    parts.save_to_disk(tmp_path / "parts")
    sources: list[tuple[Path, dict[str, str]]] = [
        (write(tmp_path / "pairs.jsonl", pairs), {}),
        (write(tmp_path / "messages.jsonl", messages), {}),
        (write(tmp_path / "named.jsonl", named), {"prompt": "question", "response": "answer"}),
        (tmp_path / "one", {}),
        (tmp_path / "parts", {}),
    ]
    for path, columns in sources:
        assert [row.chat() for row in read_data(str(path), columns)] == wanted, path


def test_a_dataset_id_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        if (name, split) != ("owner/chats", "train"):
            raise ValueError(f"no split {split}")
        return datasets.Dataset.from_list(
            [{"messages": chat} for chat in chats(2)] + [{"messages": []}] * bad
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bad = 0
    assert [row.chat() for row in read_data("owner/chats")] == chats(2)
    with pytest.raises(DataError, match=r"'owner/chats' \(split 'dev'\) cannot be loaded: no split dev"):
        read_data("owner/chats", split="dev")
    bad = 1
    with pytest.raises(DataError, match="owner/chats, row 2: .*must end with an assistant message"):
        read_data("owner/chats")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a"}, "either messages, or prompt and response"),
        ({"prompt": "a", "response": "b", "messages": []}, "either messages, or prompt and response"),
        ({"prompt": "a", "response": 3}, "response"),
        ({"messages": []}, "must end with an assistant message"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with an assistant message"),
        ({"messages": [{"role": "assistant"}]}, "message 0 needs a text 'content'"),
        ({"messages": "a"}, "messages"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{fault}"):
        read_data(str(path))


def test_faults_end_the_command_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    base = ["train", "--model", "no/such-model", "--out", str(tmp_path / "out"), "--data"]
    for arguments, fault in [
        ([str(path)], "line 1"),
        ([str(tmp_path / "none.jsonl")], "does not exist"),
        (["tinyworld:nobody"], "user000"),
        (["tinyworld:user000", "--rank", "many"], "'rank' must be int"),
        (["tinyworld:user000", "--phase", "later"], "'phase' must be one of"),
        (["tinyworld:user000", "--method", "direft", "--rslora"], "belong to lora"),
        (["tinyworld:user000", "--columns", "messages"], "FIELD=COLUMN"),
        (["tinyworld:user000", "--heldout-fraction", "1"], "below 1, not 1.0"),
        (["tinyworld:user000", "--heldout-fraction", "0.1"], "those of tinyworld:user000"),
        ([str(path), "--heldout", "other.jsonl", "--heldout-fraction", "0.1"], "those of other.jsonl"),
    ]:
        assert main([*base, *arguments]) == 2
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_users_come_from_a_folder_a_column_or_tinyworld(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "user": name} for name in ("ann", "bob", "ann")]
    users = by_user(str(write(tmp_path / "all.jsonl", rows)))
    assert {name: len(found) for name, found in users.items()} == {"ann": 2, "bob": 1}
    write(tmp_path / "users/ann.jsonl", rows)
    write(tmp_path / "users/bob.jsonl", rows[:1])
    assert {name: len(found) for name, found in by_user(str(tmp_path / "users")).items()} == {
        "ann": 3,
        "bob": 1,
    }
    assert list(by_user("tinyworld:2")) == ["user000", "user001"]
    for name in ("../up", "", None, ".hidden"):
        path = write(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "b", "user": name}])
        with pytest.raises(DataError, match="row 1: user must be a plain file name"):
            by_user(str(path))


def test_rows_are_held_out_by_content() -> None:
    rows = read_data("tinyworld:user003")
    kept, out = hold_out(rows, 0.25)
    assert 0.15 < len(out) / len(rows) < 0.35
    assert hold_out(rows[:50], 0.25)[1] == [row for row in out if row in rows[:50]]
    assert hold_out(rows, 0.0) == (rows, [])
    assert kept


def test_options_are_the_dataclasses_fields() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, AdapterConfig)
    add_options(parser, TrainConfig, skip=("seed",))
    assert from_options(AdapterConfig, parser.parse_args([])) == AdapterConfig()
    given = "--target-modules q_proj,v_proj --layers 0,2 --rslora --alpha 3 --phase all --packing 64 --bf16"
    arguments = parser.parse_args(given.split())
    assert from_options(AdapterConfig, arguments) == AdapterConfig(
        target_modules=("q_proj", "v_proj"), layers=(0, 2), rslora=True, alpha=3.0, phase=Phase.ALL
    )
    assert from_options(TrainConfig, arguments, seed=3) == TrainConfig(packing=64, bf16=True, seed=3)
    patterns = parser.parse_args(
        ["--target-modules", r".*\.[0-3]\.mlp\..*", "--rank-pattern", "q_proj=4,up_proj=2"]
    )
    assert from_options(AdapterConfig, patterns) == AdapterConfig(
        target_modules=r".*\.[0-3]\.mlp\..*", rank_pattern={"q_proj": 4, "up_proj": 2}
    )
    none = parser.parse_args(["--packing", "none", "--no-rslora"])
    assert from_options(TrainConfig, none) == TrainConfig()
    with pytest.raises(ConfigError, match="'steps' must be int"):
        from_options(TrainConfig, parser.parse_args(["--steps", "1.5"]))


def test_the_seed_is_the_trainings_and_not_the_models() -> None:
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    text = "--model random:llama --out out --seed 3 --dtype bfloat16"
    arguments = parser.parse_args(text.split())
    assert model_config(arguments) == ModelConfig("random:llama", dtype="bfloat16", seed=0)
    assert from_options(TrainConfig, arguments).seed == 3


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def kill_when(process: subprocess.Popen[bytes], path: Path, seconds: float = 300.0) -> None:
    """SIGKILL as soon as the file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """The smoke test of the command: as a subprocess, killed, resumed; equal to an unbroken run, bit for bit."""
    rows = [{"messages": chat} for chat in chats(8)]
    data = write(tmp_path / "rows.jsonl", rows)
    steps = 30

    def command(out: Path) -> list[str]:
        text = f"--data {data} --model random:llama --steps {steps} --batch-size 4 --save-every 5 --rank 4"
        return ["train", "--out", str(out), "--heldout-fraction", "0.3", *text.split()]

    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "preft", *command(out)], env=environment())
    kill_when(process, out / "checkpoints/checkpoint-10/complete")
    assert not (out / "adapter").exists()
    assert read_json(out / "manifest.json")["status"] == "running"
    assert main(command(out)) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert main(command(tmp_path / "whole")) == 0
    files = [folder / "adapter/adapter_model.safetensors" for folder in (out, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = read_json(out / "metrics.json")
    assert metrics["heldout_loss"] < metrics["base_loss"]
    assert metrics["steps"] == steps
    assert "Training loss" in (out / "report.html").read_text()
    saved = read_adapter(out / "adapter").config
    assert (saved.method, saved.rank, saved.phase) == ("lora", 4, Phase.PREFILL)
    assert not (out / "checkpoints").exists(), "of no use once the adapter is there"
    stamp = files[0].stat().st_mtime_ns
    assert main(command(out)) == 0
    assert files[0].stat().st_mtime_ns == stamp, "a finished run is kept"
