"""The user's path: own messages in a CSV, a local model, and five commands over one folder; and what they refuse."""

import csv
import json
import shutil
from dataclasses import replace

import pytest

from assumptions.cli import COMMANDS, main
from assumptions.commands.study import Study, advance, load_study
from assumptions.dimensions import NAMES
from assumptions.judges import check_judge
from assumptions.monitor.command import add_arguments, chosen
from assumptions.settings import AssumptionProbingConfig, JudgeSettings
from shared.errors import UserError
from shared.models import ModelConfig, load
from shared.serialize import read_json, write_json
from shared.tinyworld import MODEL_DIR, social


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a file of messages, as a user has them."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copytree(MODEL_DIR, folder / "model")
    with (folder / "mine.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "who"])
        rows.writerows([turn.text, "me"] for turn in social.sample_turns(100, seed=6))
    return folder


@pytest.mark.slow
def test_the_users_path_in_five_commands(place, capsys):
    study, data = str(place / "study"), str(place / "mine.csv")
    begin = [
        "elicit",
        "--model",
        str(place / "model"),
        "--data",
        data,
        "--column",
        "text=prompt",
        "--out",
        study,
    ]
    assert main([*begin, "--instrument", "tinyworld_nine", "--engine", "hf", "--free"]) == 0
    written = capsys.readouterr()
    assert json.loads(written.out)["valid_share"] == 1
    assert f"next: assumptions probe {study}" in written.err
    assert main(["probe", study, "--shuffles", "1"]) == 0
    assert "r2_bag_of_words" in capsys.readouterr().out
    few = "--doses -3 0 3 --random 1 --messages 8 --dimensions validation_seeking --block reading --controls words"
    few += " --again 4"
    assert main(["steer", study, *few.split(), "--judge", "lexical"]) == 0
    assert "validation_seeking" in capsys.readouterr().out
    assert main(["report", study, "--out", str(place / "page.html")]) == 0
    page = (place / "page.html").read_text()
    assert "What steering does" in page
    assert "What it states when steered" in page
    assert (
        "What speaks against steering these dimensions" in page
    )  # 60 training messages hold too few extremes
    assert "is the steepest beside 1 random ones 50% of the time" in page
    assert "through the score that is then stated" in page
    assert "<script src" not in page

    figures = read_json(place / "study" / "metrics.json")
    assert figures["dose_response_slope"]["validation_seeking"] > 0
    assert min(one["r2"] for one in figures["probe"].values()) > 0.7
    assert load_study(place / "study").last == "steer"
    config, probes, directions = chosen(monitor_arguments("--study", study))
    assert (config.name, probes.name, directions.name) == (str(place / "model"), "probes", "directions")
    assert list(read_json(probes / "probes.json")["probes"]) == list(NAMES)


def monitor_arguments(*given):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["probe", "nowhere"], "begin with `assumptions elicit"),
        (["steer", "nowhere"], "holds no study"),
        (["report", "nowhere"], "holds no study"),
        (["monitor", "--study", "nowhere", "--port", "0"], "holds no study"),
        (["monitor", "--model", "some/model", "--port", "0"], "give --probes FOLDER"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(command, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("assumptions: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_command_has_its_help(capsys):
    assert main([]) == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
    assert "--judge-url" in capsys.readouterr().out


def test_a_judge_that_grades_nothing_is_told(tmp_path, monkeypatch, capsys):
    write_json(
        tmp_path / "study.json", Study(ModelConfig("tinyworld"), AssumptionProbingConfig(), last="probe")
    )
    name = "user_rightness"
    figures = {key: {name: float("nan")} for key in ("dose_response_slope", "dose_response_rho")}
    figures |= {
        "slope_over_largest_random": {name: None},
        "judged": {name: {"0": 0.25}},
        "doubts": {name: []},
    }
    monkeypatch.setattr("assumptions.commands.study.run_pipeline", lambda *_: figures)
    assert main(["steer", str(tmp_path), "--dimensions", name]) == 0
    assert f"graded less than half of the unedited replies under {name}" in capsys.readouterr().err
    figures["judged"][name]["0"] = 0.75
    assert main(["steer", str(tmp_path), "--dimensions", name]) == 0
    assert "note:" not in capsys.readouterr().err
    figures["doubts"][name] = ["labels have SD 0.01"]
    judge = "--judge server --judge-model g --judge-url u --judge-repeats 3 --judge-temperature 0.5"
    more = [*judge.split(), "--human-grades", "people.csv", "--doses"]
    assert main(["steer", str(tmp_path), "--dimensions", name, *more]) == 0
    asked = JudgeSettings("server", "u", "g", repeats=3, temperature=0.5, human="people.csv")
    assert load_study(tmp_path).settings.judge == asked
    assert f"note: {name}: labels have SD 0.01" in capsys.readouterr().err
    assert load_study(tmp_path).settings.steering.doses == []  # to be searched


def test_a_step_that_fails_leaves_the_study_where_it_was(tmp_path, monkeypatch):
    before = Study(ModelConfig("tinyworld"), AssumptionProbingConfig())
    write_json(tmp_path / "study.json", before)
    later = replace(before, settings=replace(before.settings, shuffles=1))

    def fails(*_):
        raise UserError("no")

    monkeypatch.setattr("assumptions.commands.study.run_pipeline", fails)
    with pytest.raises(UserError, match="no"):
        advance(tmp_path, later, "probe")
    assert load_study(tmp_path) == before
    monkeypatch.setattr("assumptions.commands.study.run_pipeline", lambda *_: {})
    advance(tmp_path, later, "probe")
    assert load_study(tmp_path) == replace(later, last="probe")
    (tmp_path / "directions").mkdir()  # of a step before the new probes
    assert chosen(monitor_arguments("--study", str(tmp_path)))[1:] == (tmp_path / "probes", None)


def test_a_damaged_study_is_named(tmp_path, place):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_study(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"model": {"name": "x"}, "settings": {"kind": 1}}))
    with pytest.raises(UserError, match=r"settings\.kind"):
        load_study(tmp_path)


def test_the_exact_judge_reads_the_embedded_worlds_models_only(place):
    check_judge(JudgeSettings(), load(str(place / "model")))
    stranger = load("random:llama")
    with pytest.raises(UserError, match="lexical judge"):
        check_judge(JudgeSettings(), stranger)
    check_judge(JudgeSettings("local", model="x"), stranger)
