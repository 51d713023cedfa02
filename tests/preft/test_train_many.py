"""`preft train-many`: killed and resumed, a user that fails beside users that do not, processes that die."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preft_cases import chats, no_model, process_id
from test_train_command import environment, kill_when, write

from preft.adapters import AdapterError
from preft.cli import main
from preft.train.command import hold_out
from preft.train.data import DataRow
from preft.train.many import UserTask, add_arguments, user_tasks
from preft.train.pool import Outcome, Place, _Worker, run_tasks
from shared.errors import UserError
from shared.serialize import read_json

pytestmark = pytest.mark.slow


def test_users_are_trained_resumed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "users", tmp_path / "out"
    for i, name in enumerate(("ann", "bob")):
        write(data / f"{name}.jsonl", [{"messages": chat} for chat in chats(8)[i:]])
    text = f"--data {data} --out {out} --model random:llama --rank 4 --batch-size 4 --packing 96"
    command = ["train-many", "--steps", "16", "--device", "cpu", *text.split()]
    process = subprocess.Popen([sys.executable, "-m", "preft", *command], env=environment())
    kill_when(process, out / "bob/checkpoints/checkpoint-4/complete")
    finished = out / "ann/adapter/adapter_model.safetensors"
    stamp = finished.stat().st_mtime_ns
    wait_for_orphans(out / "bob/metrics.jsonl")
    half = (out / "bob/metrics.jsonl").read_text()
    assert not (out / "bob/adapter").exists()

    write(data / "eve.jsonl", [{"prompt": "sun " * 100, "response": "no"}])  # longer than packing allows
    write(data / "tom.jsonl", [{"prompt": "sun"}])
    assert main(command) == 1
    assert finished.stat().st_mtime_ns == stamp, "a finished user is skipped"
    again = (out / "bob/metrics.jsonl").read_text()
    kept = half.splitlines()[:4]
    assert again.splitlines()[:4] == kept, "the steps up to the checkpoint are not done again"
    rows = {row["user"]: row for row in read_json(out / "users.json")}
    assert list(rows) == ["ann", "bob", "eve", "tom"]
    assert "packing=96" in rows["eve"]["error"]
    assert "tom.jsonl, line 1: " in rows["tom"]["error"]
    for name, count in (("ann", 8), ("bob", 7)):
        assert rows[name]["error"] is None
        assert rows[name]["chats"] == count
        assert rows[name]["steps"] == 16
        assert (Path(rows[name]["adapter"]) / "adapter_config.json").exists()
    printed = capsys.readouterr().out
    assert "2 of 4 users trained" in printed
    assert "failed: eve: AdapterError" in printed


def test_a_user_whose_rows_will_not_do_is_that_users_failure(tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in chats(8)]
    held_out = hold_out([DataRow(**row) for row in rows], 0.3)[1]
    assert held_out
    for name, found in (("ann", rows), ("bob", [vars(held_out[0])]), ("eve", [*rows, {"prompt": "sun"}])):
        write(tmp_path / f"{name}.jsonl", found)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = f"--data {tmp_path} --out out --model random:llama --heldout-fraction 0.3"
    tasks = user_tasks(parser.parse_args(text.split()))
    assert list(tasks) == ["ann", "bob", "eve"]
    ann, bob, eve = tasks.values()
    assert isinstance(ann, UserTask)
    assert (len(ann.train), len(ann.heldout)) == (8 - len(held_out), len(held_out))
    assert isinstance(bob, Outcome)
    assert bob == Outcome("bob", None, "AdapterError: --heldout-fraction 0.3 leaves no row of 1 to train on")
    assert isinstance(eve, Outcome)
    assert "eve.jsonl, line 9: " in str(eve.error)
    with pytest.raises(AdapterError, match="below 1"):
        user_tasks(parser.parse_args([*text.split()[:-1], "1.5"]))


def wait_for_orphans(log: Path) -> None:
    """Until the killed command's children have ended too: nothing is logged any more."""
    size, end = -1, time.monotonic() + 60
    while log.stat().st_size != size:
        assert time.monotonic() < end, "a child outlives its parent"
        size = log.stat().st_size
        time.sleep(1.0)


def test_a_process_that_dies_loses_its_task_only() -> None:
    tasks = {name: name for name in ("a", "die", "b", "raise", "c")}
    outcomes = {outcome.name: outcome for outcome in run_tasks(tasks, process_id, [Place({}, 1)])}
    assert set(outcomes) == set(tasks)
    assert outcomes["die"].error == "the process ended with code 7"
    assert outcomes["raise"].error == "KeyError: 'gone'"
    pids = [outcomes[name].result for name in "abc"]
    assert pids[0] != pids[1] == pids[2]
    idle = _Worker(process_id, Place({}, 1))
    assert idle.receive() is None
    idle.process.kill()
    idle.process.join()
    idle.send("late", "a")
    assert idle.receive() == Outcome("late", None, "the process ended with code -9")
    with pytest.raises(UserError, match="no such model"):
        list(run_tasks(tasks, no_model, [Place({}, 1)] * 2))
