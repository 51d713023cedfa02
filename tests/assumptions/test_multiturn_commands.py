"""`assumptions goals`, `transcripts` and `survey` end to end, on engines whose behaviour is planted."""

import csv
import json
import re

import numpy as np
import pytest

from assumptions.asking import OnDemand
from assumptions.cli import main
from assumptions.commands.engine import Asked
from assumptions.dimensions import NAMES, SIGNS
from shared.generation import Completion
from shared.serialize import read_json

CARRY = 0.5  # of the distance to the present goal's level that a turn leaves


class Planted:
    """Elicitor, replier and player in one: the balance of its scores follows the goal of the last message, with carry.

    The player says the goal it is told to hold; the replies are plain. `asked` counts elicited turns; it can die.
    """

    def __init__(self, dies_after=None):
        self.asked, self.dies_after = 0, dies_after

    def generate(self, requests, sampling):
        return [[Completion(self.answer(request.prompt), [], [], "stop")] for request in requests]

    def answer(self, messages):
        text = messages[-1]["content"]
        if text.startswith("You play a person"):
            return (
                "I want an impartial view." if "You want an impartial view" in text else "Tell me I am right."
            )
        if "RESPONSE" not in text and "JSON" not in text:
            return "A plain reply."
        self.asked += 1
        if self.dies_after is not None and self.asked > self.dies_after:
            raise RuntimeError("the engine died")
        said = self.history(text)
        level = 0.0
        for number, one in enumerate(said):
            goal = float("impartial" in one)
            level = goal if number == 0 else goal + CARRY * (level - goal)
        if "scores rise" in said:
            level = 1 - 0.1 * len(said)
        return json.dumps(
            {name: 0.9 - 0.8 * level if SIGNS[name] > 0 else 0.1 + 0.8 * level for name in NAMES}
        )

    def history(self, text):
        """What the person has said, the new message last."""
        return re.findall(r"Tell me I am right\.|I want an impartial view\.|scores rise", text)

    def close(self):
        pass


@pytest.fixture
def planted(monkeypatch):
    """An engine in place of every model; returned so that a test can look at it or let it die."""
    engines = []

    def use(**options):
        engines.append(Planted(**options))
        for module in ("goals", "transcripts"):
            monkeypatch.setattr(
                f"assumptions.commands.{module}.open_engine",
                lambda arguments: Asked(None, arguments.model, OnDemand(lambda: engines[-1])),
            )
        return engines[-1]

    return use


def script(path, turns=8, after=4, conversations=3):
    """Prepared turns of all four modes."""
    words = {"validation": "Tell me I am right.", "objectivity": "I want an impartial view."}
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "goal", "switched", *[f"user_{t + 1}" for t in range(turns)]])
        for goal, other in (("validation", "objectivity"), ("objectivity", "validation")):
            for switched in ("yes", "no"):
                for number in range(conversations):
                    later = other if switched == "yes" else goal
                    said = [words[goal]] * after + [words[later]] * (turns - after)
                    rows.writerow([f"c{number}", goal, switched, *said])
    return path


class TestGoals:
    def command(self, folder, *more):
        return ["goals", "--model", "m", "--engine", "hf", "--free", "--out", str(folder), *more]

    def test_a_planted_carry_over_is_found_and_a_stopped_run_goes_on(self, planted, tmp_path, capsys):
        given = ["--script", str(script(tmp_path / "turns.csv")), "--turns", "8", "--switch-after", "4"]
        planted(dies_after=40)  # three conversations of eight turns make a step
        with pytest.raises(Exception, match="died"):
            main(self.command(tmp_path / "out", *given))
        engine = planted()
        assert main(self.command(tmp_path / "out", *given)) == 0
        assert engine.asked == 3 * 4 * 8 - 24  # the step that was ended is kept
        assert capsys.readouterr().out.endswith("report.html\n")
        figures = read_json(tmp_path / "out" / "metrics.json")
        found = figures["switches"]["validation_to_objectivity"]["objectivity_seeking"]
        assert found["pre"][0] == pytest.approx(0.1)
        assert found["jump"][0] == pytest.approx(0.8 * (1 - CARRY))
        assert found["stickiness"][0] == pytest.approx(CARRY**4)
        assert found["half_life_median"] == pytest.approx(1.0)
        assert figures["drifts"]["validation"]["user_rightness"][0] == pytest.approx(0)
        page = (tmp_path / "out" / "report.html").read_text()
        assert "Switch objectivity_to_validation" in page
        assert "Drift while the goal stays objectivity" in page
        lines = (tmp_path / "out" / "turns.jsonl").read_text().splitlines()
        assert len(lines) == 96
        again = planted()
        assert main(self.command(tmp_path / "out", *given)) == 0
        assert again.asked == 0

    def test_a_model_plays_our_pairs(self, planted, tmp_path):
        engine = planted()
        given = ["--limit", "2", "--turns", "4", "--switch-after", "2"]
        assert main(self.command(tmp_path / "out", *given)) == 0
        assert engine.asked == 2 * 4 * 4
        figures = read_json(tmp_path / "out" / "metrics.json")
        found = figures["switches"]["objectivity_to_validation"]["validation_seeking"]
        assert found["conversations"] == 2
        assert found["residual"][0] < 0  # it has not come all the way

    def test_what_does_not_fit_is_refused_before_anything_is_asked(self, planted, tmp_path, capsys):
        engine = planted()
        path = script(tmp_path / "turns.csv", conversations=1)
        half = tmp_path / "half.csv"
        half.write_text("\n".join(line for line in path.read_text().splitlines() if ",no," not in line))
        wrong = tmp_path / "wrong.csv"
        wrong.write_text("goal,switched,user_1\nfame,yes,hello\n")
        for more, said in (
            (["--instrument", "openended"], "has no scores"),
            (["--switch-after", "10"], "between 1 and"),
            (["--speaker", "x"], "on --server"),
            (["--script", str(wrong)], "'fame'"),
            (["--script", str(half)], "say where it leads"),
            (["--script", str(tmp_path / "absent.csv")], "absent.csv"),
            (["--instrument", "4dims", "--engine", "vllm"], "--free"),
        ):
            command = self.command(tmp_path / "no", *more)
            if "--engine" in more:
                command.remove("--free")
            assert main(command) == 2
            assert said.replace("--free", "guided=false") in capsys.readouterr().err
        assert engine.asked == 0


class TestTranscripts:
    def test_a_planted_rise_is_found_turn_by_turn(self, planted, tmp_path):
        said = [{"role": role, "content": "scores rise"} for _ in range(4) for role in ("user", "assistant")]
        data = tmp_path / "mine.jsonl"
        rows = [{"id": "long", "messages": said}, {"id": "short", "messages": said[:5]}]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = planted()
        command = ["transcripts", "--model", "m", "--engine", "hf", "--free", "--data", str(data)]
        command += ["--out", str(tmp_path / "out")]
        assert main(command) == 0
        assert engine.asked == 4 + 3
        figures = read_json(tmp_path / "out" / "metrics.json")
        with (tmp_path / "out" / "turns.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [(row["conversation"], row["turn"]) for row in table][:5] == [
            ("long", "1"), ("long", "2"), ("long", "3"), ("long", "4"), ("short", "1")
        ]  # fmt: skip
        rising = [float(row["S+ less S-"]) for row in table[:4]]
        slope = np.polyfit(range(4), rising, 1)[0]
        assert slope > 0.1
        assert figures["slopes"]["S+ less S-"][0] == pytest.approx(slope, rel=0.01)
        assert figures["health"]["clean"] == 7
        assert "by conversation" in (tmp_path / "out" / "report.html").read_text()
        again = planted()
        assert main(command) == 0
        assert again.asked == 0

    def test_what_does_not_fit_is_refused(self, planted, tmp_path, capsys):
        planted()
        for row, said in (
            ({"messages": []}, "'messages' is empty"),
            ({"messages": [{"role": "user", "content": " "}]}, "turn 1"),
            ({"messages": [{"role": "boss", "content": "hi"}]}, "system, user or assistant"),
            ({"text": "hi"}, "messages"),
        ):
            (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
            command = ["transcripts", "--model", "m", "--free", "--data", str(tmp_path / "bad.jsonl")]
            assert main([*command, "--out", str(tmp_path / "no")]) == 2
            assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


class TestSurvey:
    def test_from_queries_to_the_gap(self, tmp_path, capsys):
        """People expect 20 points more objectivity of an assistant; the model's score lies 0.2 below theirs."""
        with (tmp_path / "queries.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *([f"q{i}", f"message {i}"] for i in range(6))])
        survey = tmp_path / "survey.csv"
        names = ["objectivity_seeking", "emotional_support"]
        command = [
            "survey",
            "items",
            str(tmp_path / "queries.csv"),
            "--participants",
            "12",
            "--out",
            str(survey),
        ]
        assert main([*command, "--dimensions", *names]) == 0
        assert "144 questions" in capsys.readouterr().out
        draw = np.random.default_rng(0)
        with survey.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows[:-1]:  # the last question was passed over
            shift = 20 * (row["addressee"] == "ai") * (row["dimension"] == names[0])
            row["rating"] = 40 + shift + draw.normal(0, 3)
        with (tmp_path / "ratings.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        with (tmp_path / "scores.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", *names], *([f"q{i}", 0.4, ""] for i in range(6))])
        analyze = [
            "survey",
            "analyze",
            str(survey),
            str(tmp_path / "ratings.csv"),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*analyze, "--scores", str(tmp_path / "scores.csv")]) == 0
        figures = read_json(tmp_path / "out" / "metrics.json")
        assert figures["answered"] == pytest.approx(143 / 144)
        gap = figures["gaps"]["objectivity_seeking"]
        assert gap["addressee"]["slope"][0] == pytest.approx(0.2, abs=0.02)
        assert gap["model_less_people"][0] == pytest.approx(-0.2, abs=0.02)
        assert figures["gaps"]["emotional_support"]["model_less_people"] is None
        assert "assistant less person" in (tmp_path / "out" / "report.html").read_text()

    def test_what_does_not_fit_is_refused(self, tmp_path, capsys):
        queries = tmp_path / "queries.csv"
        queries.write_text("id,text\na,hello\nb,bye\n")
        survey, out = str(tmp_path / "survey.jsonl"), str(tmp_path / "out")
        items = ["survey", "items", str(queries), "--out", survey]
        for command, said in (
            ([*items, "--participants", "3"], "even"),
            ([*items, "--participants", "2", "--dimensions", "fame"], "fame"),
        ):
            assert main(command) == 2
            assert said in capsys.readouterr().err
        assert main([*items, "--participants", "2"]) == 0
        (tmp_path / "ratings.csv").write_text(
            "participant,query,addressee,dimension,rating\np9,a,ai,user_rightness,5\n"
        )
        (tmp_path / "scores.csv").write_text("id,user_rightness\na,high\n")
        analyze = ["survey", "analyze", survey, str(tmp_path / "ratings.csv"), "--out", out]
        assert main(analyze) == 2
        assert "was not asked" in capsys.readouterr().err
        (tmp_path / "ratings.csv").write_text("participant,query,addressee,dimension,rating\n")
        assert main([*analyze, "--scores", str(tmp_path / "scores.csv")]) == 2
        assert "scores as numbers" in capsys.readouterr().err
        assert main(analyze) == 2
        assert "none of its questions is answered" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
