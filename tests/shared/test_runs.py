"""Run folders: manifest, metrics, stages that resume, failure."""

import json
import subprocess
from dataclasses import dataclass

import pytest
import torch

from shared import manifest
from shared.runs import start_run
from shared.serialize import read_json, write_json


@dataclass
class Settings:
    steps: int = 3


@dataclass
class FakeModel:
    """As much of a model as a run reads."""

    fingerprint: str
    config: Settings


def test_a_finished_run_leaves_its_files(tmp_path):
    with start_run(tmp_path / "run", Settings(), seed=7) as run:
        run.use_model(FakeModel("ab" * 8, Settings(1)))
        run.metrics({"loss": {"base": torch.tensor(0.5), "lora": float("nan")}})
        run.metrics({"more": 1})
        run.log(1, loss=2.0)
        run.log(2, loss=1.0)
        run.report.text("# What came out")
    manifest = read_json(run.path("manifest.json"))
    assert manifest["status"] == "finished"
    assert manifest["seed"] == 7
    assert manifest["config"] == {"steps": 3}
    assert manifest["model"] == {"fingerprint": "ab" * 8, "config": {"steps": 1}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"python", "platform", "hardware", "git", "started", "finished", "command"} <= manifest.keys()
    assert read_json(run.path("metrics.json")) == {"loss": {"base": 0.5, "lora": None}, "more": 1}
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0)]
    page = run.path("report.html").read_text()
    assert "What came out" in page
    assert "loss.base" in page


def test_a_failed_run_says_so_and_raises(tmp_path):
    with pytest.raises(RuntimeError, match="no luck"), start_run(tmp_path, {}) as run:
        raise RuntimeError("no luck")
    manifest = read_json(run.path("manifest.json"))
    assert (manifest["status"], manifest["error"]) == ("failed", "RuntimeError: no luck")
    assert "no luck" in run.path("report.html").read_text()


def test_the_seed_governs_the_global_generators(tmp_path):
    draws = []
    for seed in (1, 1, 2):
        with start_run(tmp_path / "run", {}, seed=seed):
            draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]


def stage_runs(folder, config, *, seed=0, resume=True, fingerprint="a"):
    """Open the run, do its one stage if it is due, and say whether it was."""
    with start_run(folder, config, seed=seed, resume=resume) as run:
        run.use_model(FakeModel(fingerprint, Settings()))
        stage = run.stage("scores.json")
        due = not stage.done
        if due:
            with stage as path:
                write_json(path, config)
        assert read_json(stage.path) == config
    return due


def test_a_finished_stage_is_skipped_only_under_the_same_settings(tmp_path):
    assert stage_runs(tmp_path, {"a": 1})
    assert not stage_runs(tmp_path, {"a": 1})
    assert stage_runs(tmp_path, {"a": 2})
    assert stage_runs(tmp_path, {"a": 1}), "another configuration was here in between"
    assert stage_runs(tmp_path, {"a": 1}, seed=1)
    assert stage_runs(tmp_path, {"a": 1}, seed=1, fingerprint="b")
    assert not stage_runs(tmp_path, {"a": 1}, seed=1, fingerprint="b")
    assert stage_runs(tmp_path, {"a": 1}, seed=1, fingerprint="b", resume=False)


def test_an_interrupted_stage_is_done_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(tmp_path, {}) as run:
        run.json_stage("first.json", lambda: 1)
        with run.stage("second.json") as path:
            path.write_text("half")
            raise KeyboardInterrupt
    assert not (tmp_path / "second.json").exists()
    with start_run(tmp_path, {}) as run:
        assert run.json_stage("first.json", lambda: pytest.fail("was finished")) == 1
        assert not run.stage("second.json").done


def test_a_stage_whose_file_was_removed_is_done_again(tmp_path):
    assert stage_runs(tmp_path, {})
    (tmp_path / "scores.json").unlink()
    assert stage_runs(tmp_path, {})


def test_figures_of_a_former_run_do_not_survive(tmp_path):
    with start_run(tmp_path, {}) as run:
        run.metrics({"old": 1})
    with pytest.raises(RuntimeError, match="early"), start_run(tmp_path, {}):
        raise RuntimeError("early")
    assert not (tmp_path / "metrics.json").exists()


def test_progress_yields_everything_and_is_silent_without_a_terminal(tmp_path, capsys):
    with start_run(tmp_path, {}) as run:
        assert list(run.progress(range(5), "counting")) == [0, 1, 2, 3, 4]
        nested = [(a, b) for a in run.progress("ab", "outer") for b in run.progress("cd", "inner")]
    assert len(nested) == 4
    assert capsys.readouterr() == ("", "")


def resumed(folder, monkeypatch, **code):
    """Open the run again under changed code; its manifest, once the stage was asked for."""
    described = manifest.describe()
    monkeypatch.setattr(manifest, "describe", lambda: described | code)
    with start_run(folder, {}) as run:
        assert run.json_stage("scores.json", lambda: pytest.fail("was finished")) == 1
    return read_json(run.path("manifest.json")), run.path("report.html").read_text()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            {"git": {"commit": "b" * 40, "dirty": False, "changes": None}},
            f"commit {'a' * 12}, now commit {'b' * 12}",
        ),
        (
            {"git": {"commit": "a" * 40, "dirty": True, "changes": "c0ffee"}},
            "now commit aaaaaaaaaaaa with changes c0ffee",
        ),
        ({"git": None}, "now no git checkout"),
        ({"versions": {"torch": "2", "peft": "1"}}, "peft absent, now 1; torch 1, now 2"),
    ],
)
def test_a_stage_of_other_code_is_kept_and_named(code, expected, tmp_path, monkeypatch):
    same = {"git": {"commit": "a" * 40, "dirty": False, "changes": None}, "versions": {"torch": "1"}}
    described = manifest.describe()
    monkeypatch.setattr(manifest, "describe", lambda: described | same)
    with start_run(tmp_path, {}) as run:
        run.json_stage("scores.json", lambda: 1)
    assert read_json(run.path("stages.json"))["scores.json"]["code"] == same
    assert "stages_of_other_code" not in resumed(tmp_path, monkeypatch)[0]
    record, page = resumed(tmp_path, monkeypatch, **code)
    assert expected in record["stages_of_other_code"]["scores.json"]
    assert expected in page.partition("</p>")[0]


def test_the_code_of_a_stage_knows_uncommitted_changes(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=tmp_path, check=True
        )

    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    clean = manifest.git_state(tmp_path)
    (tmp_path / "code.py").write_text("2\n")
    second = manifest.git_state(tmp_path)
    (tmp_path / "code.py").write_text("3\n")
    third = manifest.git_state(tmp_path)
    assert (clean["dirty"], clean["changes"]) == (False, None)
    assert second["dirty"]
    assert clean["commit"] == second["commit"] == third["commit"]
    assert second["changes"] != third["changes"]


def test_a_broken_training_done_again_leaves_every_step_once(tmp_path):
    def train(stop):
        with start_run(tmp_path, {}) as run:
            if not (first := run.stage("first")).done:
                with first as path:
                    run.log(1, first=0.0)
                    path.write_text("x")
            with run.stage("adapter") as path:
                for step in range(1, 7):
                    run.log(step, loss=float(stop))
                    if step == stop:
                        raise KeyboardInterrupt
                path.write_text("x")

    for stop in (4, 2):
        with pytest.raises(KeyboardInterrupt):
            train(stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    train(99)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [
        (n, 99.0) for n in range(1, 7)
    ]
    assert [line["step"] for line in lines if "first" in line] == [1], "a finished stage keeps its line"
