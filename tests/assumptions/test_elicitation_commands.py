"""`assumptions data`, `elicit` and `words` as a user calls them, on the embedded model and on written answers."""

import csv
import json
from argparse import Namespace

import pytest

from assumptions import elicit_command
from assumptions.cli import main
from assumptions.commands import engine
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings
from assumptions.parsing import Status
from assumptions.records import Record, RecordFile
from assumptions.sources import load_messages
from shared.models import load
from shared.serialize import read_json, write_json


@pytest.fixture(scope="module")
def elicited(tmp_path_factory):
    """Two messages of the embedded world from a CSV with other column names; everything the command can do."""
    folder = tmp_path_factory.mktemp("elicit")
    chats = load_messages("tinyworld", 2, seed=8, columns={}).chats
    with (folder / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "prompt", "other"], *([c.id, c.turn, "x"] for c in chats)])
    command = (
        f"elicit --model tinyworld --data {folder}/mine.csv --out {folder}/out --instrument tinyworld_nine"
    )
    command += " --column text=prompt --column id=key --engine hf --free --temperature 1 --max-tokens 96"
    return folder, [c.id for c in chats], [*command.split(), "--score", "expected", "--orders", "2"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_elicit_writes_answers_expected_scores_and_reliability(elicited, capsys):
    folder, ids, command = elicited
    assert main(command) == 0
    health = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert health["valid_share"] == 1.0
    scores = rows_of(folder / "out" / "scores.csv")
    assert [row["id"] for row in scores] == ids
    assert list(scores[0]) == ["id", *NAMES]
    values = [float(row[name]) for row in scores for name in NAMES]
    assert all(0 <= value <= 1 for value in values)
    assert any(abs(value * 20 - round(value * 20)) > 0.01 for value in values)  # not the grid of stated ones
    facets = json.loads((folder / "out" / "reliability.json").read_text())
    assert [row["dimension"] for row in facets] == list(NAMES)
    before = (folder / "out" / "answers.jsonl").read_text()
    assert main(command) == 0  # repeated: everything is there
    assert (folder / "out" / "answers.jsonl").read_text() == before


def test_a_folder_holds_one_elicitation(elicited, tmp_path, capsys):
    """A rerun goes on and keeps what later steps have settled; with other settings it is refused."""
    folder, _, command = elicited
    out = folder / "out"
    assert main(command) == 0
    later = read_json(out / "study.json")
    later["settings"]["shuffles"], later["last"] = 3, "probe"
    write_json(out / "study.json", later)
    held = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == held
    for changed, said in (
        (["--temperature", "0.5"], "another settings"),
        (["--score", "stated"], "another score"),
        (["--column", "text=other", "--column", "id=key"], "another columns"),
        (["--model", "tinyworld-readable"], "another model"),
        (["--tokenizer", "random:llama"], "another tokenizer"),
    ):
        capsys.readouterr()
        assert main([*command, *changed]) == 2
        assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == held
    with (folder / "mine.csv").open("a", newline="") as file:
        csv.writer(file).writerow(
            ["third", load_messages("tinyworld", 3, seed=8, columns={}).chats[2].turn, "x"]
        )
    assert main(command) == 0  # more rows: the new one is asked, and the later steps are to be taken again
    study = read_json(out / "study.json")
    assert (study["settings"]["messages"], study["settings"]["shuffles"], study["last"]) == (3, 3, "elicit")
    assert (out / "answers.jsonl").read_bytes().startswith(held["answers.jsonl"])
    write_json(out / "study.json", study | {"last": "steer"})
    text = (folder / "mine.csv").read_text()
    (folder / "mine.csv").write_text(text.replace(",x", ",y"))  # a column that nothing reads
    assert main(command) == 0
    assert read_json(out / "study.json")["last"] == "steer"
    (folder / "mine.csv").write_text(
        text.replace("About", "Again about", 1)
    )  # as many rows, one of them another
    assert main(command) == 0
    assert read_json(out / "study.json")["last"] == "elicit"


def test_a_model_that_could_not_be_loaded_leaves_no_claim_on_the_folder(elicited, capsys):
    folder, _, command = elicited
    stated = [*command[: command.index("--score")], "--out", str(folder / "second"), "--max-tokens", "4"]
    assert main([*stated, "--model", str(folder / "no-model")]) == 2
    assert "no-model" in capsys.readouterr().err
    assert main(stated) == 0


def test_what_does_not_fit_is_one_line_before_any_work(elicited, tmp_path, capsys):
    folder, _, _ = elicited
    data = f"--data {folder}/mine.csv --out {tmp_path}/out --model tinyworld"
    for given, said in (
        (f"elicit {data} --instrument support", "no instrument 'support'"),
        (f"elicit {data} --instrument 4dims", "guided=false"),
        (f"elicit {data} --engine hf", "add --free"),
        (f"elicit {data} --column text", "write NAME=COLUMN"),
        (f"elicit {data} --server http://127.0.0.1:9/v1 --score expected", "--tokenizer"),
        (f"elicit {data} --instrument ten --free --score expected", "has no scores"),
        (f"elicit {data} --samples 3 --temperature 1 --score stated", "samples=3 go with score mean"),
        (f"elicit {data} --score mean", "set samples above 1"),
        (f"elicit {data} --column text=prompt --retest 3", "set a temperature"),
        (f"elicit {data} --column text=prompt --orders 1", "at least two"),
        (f"elicit {data}", "no column 'text'; there are 'key', 'prompt', 'other'"),
        ("data elephant", "no data set 'elephant'"),
        (f"data gsm8k {tmp_path} --part test", "grade-school-math"),
        (f"words {tmp_path}/absent.jsonl --out {tmp_path}/p.html", "is no file of answers"),
    ):
        assert main(given.split()) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_lists_the_sets_says_how_to_get_one_and_writes_chats(tmp_path, capsys):
    from assumptions.chats import read_chats
    from assumptions.corpora import load_corpus

    assert main(["data"]) == 0
    assert "elephant_oeq" in capsys.readouterr().out
    assert main(["data", "cancer_myth"]) == 0
    assert "Bill1235813" in capsys.readouterr().out
    path = tmp_path / "chats.jsonl"
    assert main(["data", "goal_switch", "--out", str(path), "--limit", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 6
    assert read_chats(path) == load_corpus("goal_switch", limit=6).chats()


def test_words_writes_a_page_with_both_denominators(tmp_path, capsys):
    def answers(name, wanted):
        path = tmp_path / f"{name}.jsonl"
        with RecordFile(path, {"instrument": "openended-v1"}) as file:
            models = [
                {
                    "model_name": f"{wanted} {i}",
                    "description": f"wants {wanted} from a letter",
                    "probability": 0.3,
                }
                for i in ("warmly", "openly", "quietly")
            ]
            text = json.dumps({"mental_models": models}) + "\nRESPONSE: hello"
            file.append([Record(f"r{i}", 0, Status.CLEAN, {}, text) for i in range(8)])
        return str(path)

    page = tmp_path / "words.html"
    first, second = answers("first", "reassurance"), answers("second", "sources")
    assert main(["words", first, "--against", second, "--clusters", "2", "--out", str(page)]) == 0
    text = page.read_text()
    for told in ("share_of_assumptions", "share_of_responses", "reassurance", "Log-odds against", "Clusters"):
        assert told in text
    assert "8 responses, 2 clusters" in capsys.readouterr().out


def test_beside_vllm_the_model_is_held_on_the_cpu_and_a_study_goes_on_where_it_can(monkeypatch):
    """A second copy of the weights on the GPU would leave vLLM too little of it."""
    held = []
    monkeypatch.setattr(engine, "load", lambda config: held.append(config.device) or load(config))
    given = {"model": "random:llama", "dtype": "float32", "server": None, "replicas": 1}
    given |= {"data": "mine.csv", "column": [], "instrument": "nine_scores", "seed": 0}
    for name in ("vllm", "hf"):
        arguments = Namespace(**given, engine=name)
        model = engine.open_engine(arguments).model
        settings = ElicitationSettings(guided=name == "vllm")
        assert elicit_command._study(arguments, model, settings, "stated", []).model.device == "auto"
    assert held == ["cpu", "auto"]
