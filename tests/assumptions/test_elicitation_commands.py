"""`assumptions data`, `elicit` and `words` as a user calls them, on the embedded model and on written answers."""

import csv
import json

import pytest

from assumptions.cli import main
from assumptions.dimensions import NAMES
from assumptions.parsing import Status
from assumptions.records import Record, RecordFile
from assumptions.sources import load_messages


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
    return folder, [c.id for c in chats], [*command.split(), "--expected", "--orders", "2"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_elicit_writes_answers_scores_expected_values_and_reliability(elicited, capsys):
    folder, ids, command = elicited
    assert main(command) == 0
    health = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert health["valid_share"] == 1.0
    stated, expected = rows_of(folder / "out" / "scores.csv"), rows_of(folder / "out" / "expected.csv")
    assert [row["id"] for row in stated] == [row["id"] for row in expected] == ids
    assert list(stated[0]) == ["id", *NAMES]
    assert all(0 <= float(row[name]) <= 1 for row in (*stated, *expected) for name in NAMES)
    facets = json.loads((folder / "out" / "reliability.json").read_text())
    assert [row["dimension"] for row in facets] == list(NAMES)
    before = (folder / "out" / "answers.jsonl").read_text()
    assert main(command) == 0  # repeated: everything is there
    assert (folder / "out" / "answers.jsonl").read_text() == before


def test_what_does_not_fit_is_one_line_before_any_work(elicited, tmp_path, capsys):
    folder, _, _ = elicited
    data = f"--data {folder}/mine.csv --out {tmp_path}/out --model tinyworld"
    for given, said in (
        (f"elicit {data} --instrument support", "no instrument 'support'"),
        (f"elicit {data} --instrument 4dims", "guided=false"),
        (f"elicit {data} --engine hf", "add --free"),
        (f"elicit {data} --column text", "write NAME=COLUMN"),
        (f"elicit {data} --server http://127.0.0.1:9/v1 --expected", "needs the model's tokens"),
        (f"elicit {data} --instrument ten --expected", "has no scores"),
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
