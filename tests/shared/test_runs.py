"""Run folders: manifest, metrics, stages that resume, failure."""

import json
from dataclasses import dataclass

import pytest
import torch

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
