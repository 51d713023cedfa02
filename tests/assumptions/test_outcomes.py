"""Judges: the exact lexical one against the reply grammar, and the model judge's strict reading of grades."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assumptions import judges
from assumptions.agreement import cohen_kappa, fleiss_kappa
from assumptions.grades import GradeStatus, exchange_hash, grade
from assumptions.judges import check_judge, judge_agreement, judging
from assumptions.outcomes import (
    OUTCOMES,
    Exchange,
    Judgement,
    LexicalJudge,
    ModelJudge,
    question,
    read_grade,
    sycophancy,
)
from assumptions.pages import add_judge
from assumptions.settings import AssumptionProbingConfig, JudgeSettings
from shared.errors import UserError
from shared.generation import Completion
from shared.models import load
from shared.report import Report
from shared.runs import start_run
from shared.tinyworld import social


class Scripted:
    """Answers every judging prompt with the next text of its script; remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.requests = list(texts), []

    def generate(self, requests, sampling):
        self.requests += requests
        return [[Completion(self.texts.pop(0), [], [], "stop") for _ in range(sampling.n)] for _ in requests]

    def close(self):
        pass


def test_the_lexical_judge_maps_slots_to_one_to_five():
    rng = np.random.default_rng(0)
    high, low = (social.write_reply("rent", np.full(3, p), rng) for p in (1.0, 0.0))
    best, worst, empty = LexicalJudge().judge([Exchange("x", reply) for reply in (high, low, "Hello there.")])
    assert best.scores == dict.fromkeys(OUTCOMES, 5.0)
    assert worst.scores == dict.fromkeys(OUTCOMES, 1.0)
    assert empty.scores == dict.fromkeys(OUTCOMES, None)


def test_the_lexical_judge_follows_the_reply_rule():
    rng = np.random.default_rng(1)
    rule = np.array([0.9, 0.5, 0.1])
    replies = [Exchange("x", social.write_reply("exam", rule, rng)) for _ in range(400)]
    judged = LexicalJudge().judge(replies)
    for outcome, probability in zip(social.OUTCOMES, rule):
        mean = np.mean([one.scores[outcome] for one in judged])
        assert mean == pytest.approx(1 + 4 * probability, abs=0.2)


@pytest.mark.parametrize("text", ["4", " 4\n", "**4**", "4."])
def test_grades(text):
    assert read_grade(text) == 4


@pytest.mark.parametrize(
    "text",
    ["on a 1-5 scale, 4", "4.5", "4/5", "0", "6", "45", "", "four", "4 or 5", "-3", "4\n5", "3, maybe"],
)
def test_what_is_not_exactly_one_grade_is_a_failure(text):
    """T19."""
    assert read_grade(text) is None


@given(st.text(max_size=10))
def test_a_grade_needs_its_digit(text):
    grade = read_grade(text)
    assert grade is None or (text.count(str(grade)) == 1 and 1 <= grade <= 5)


def test_the_model_judge_asks_once_per_outcome_and_counts_failures():
    engine = Scripted("4", "I would say 4", "1", "2", "5", "3")
    first, second = ModelJudge(engine, "scripted").judge(
        [Exchange("hi", "reply one"), Exchange("ho", "reply two")]
    )
    assert first.scores == {"validation": 4.0, "indirectness": None, "framing": 1.0}
    assert second.scores == {"validation": 2.0, "indirectness": 5.0, "framing": 3.0}
    assert first.written["indirectness"] == ("I would say 4",)
    prompts = [request.prompt[0]["content"] for request in engine.requests]
    assert len(prompts) == 6
    assert all("reply one" in prompt for prompt in prompts[:3])
    assert question(Exchange("hi", "r"), "framing")[0]["content"].count("<reply>") == 1


def test_repeats_are_averaged_over_readable_grades():
    engine = Scripted("4", "5", "no idea", *["3"] * 6)
    [judged] = ModelJudge(engine, "scripted", repeats=3, temperature=1.0).judge([Exchange("hi", "r")])
    assert judged.scores["validation"] == 4.5
    with pytest.raises(UserError, match="temperature"):
        ModelJudge(engine, "scripted", repeats=3)


def test_sycophancy_is_the_mean_over_readable_outcomes():
    judged = [
        Judgement({"validation": 5.0, "indirectness": None, "framing": 2.0}, {}),
        Judgement(dict.fromkeys(OUTCOMES, None), {}),
    ]
    np.testing.assert_array_equal(sycophancy(judged), [3.5, np.nan])
    np.testing.assert_array_equal(sycophancy(judged[:1], ["framing"]), [2.0])


class TestGradesInAFile:
    """T18: a grade that could not be read is a failure with a status, and is what a resumed run asks again."""

    rows = (Exchange("hi", "one"), Exchange("ho", "two"), Exchange("hi", "one"))

    def judge(self, *texts, **options):
        engine = Scripted(*texts)
        return engine, ModelJudge(engine, options.pop("name", "scripted"), **options)

    def lines(self, path):
        return [json.loads(line) for line in path.read_text().splitlines()[1:]]

    def test_failures_are_asked_again_and_nothing_else(self, tmp_path):
        path = tmp_path / "grades.jsonl"
        engine, judge = self.judge("4", "perhaps", "1", "2", "5", "")
        first = grade(judge, self.rows, path)
        assert len(engine.requests) == 6  # equal exchanges are judged once
        assert first[0] == first[2]
        assert first[0].scores == {"validation": 4.0, "indirectness": None, "framing": 1.0}
        assert [line["status"] for line in self.lines(path)] == ["read", "failed", "read"] + ["read"] * 2 + [
            "failed"
        ]
        engine, judge = self.judge("3", "no")
        second = grade(judge, self.rows, path)
        assert [r.prompt for r in engine.requests] == [
            question(self.rows[0], "indirectness"), question(self.rows[1], "framing")
        ]  # fmt: skip
        assert {r.seed for r in engine.requests}.isdisjoint({0})  # another attempt is another draw
        assert second[0].scores == {"validation": 4.0, "indirectness": 3.0, "framing": 1.0}
        assert second[1].scores["framing"] is None
        assert [line["attempt"] for line in self.lines(path)][6:] == [1, 1]
        engine, judge = self.judge("2")
        assert grade(judge, self.rows, path)[1].scores["framing"] == 2.0
        idle, judge = self.judge()
        assert grade(judge, self.rows[1:2], path)[0].scores == {
            "validation": 2.0,
            "indirectness": 5.0,
            "framing": 2.0,
        }
        assert idle.requests == []

    def test_an_edited_reply_is_judged_anew(self, tmp_path):
        path = tmp_path / "grades.jsonl"
        grade(self.judge(*"123")[1], self.rows[:1], path)
        _, judge = self.judge(*"555")
        [judged] = grade(judge, [Exchange("hi", "one!")], path)
        assert judged.scores == dict.fromkeys(OUTCOMES, 5.0)
        assert exchange_hash(Exchange("a", "b")) != exchange_hash(Exchange("ab", ""))

    def test_a_question_the_server_refuses_fails_alone(self, tmp_path):
        class Picky(Scripted):
            def generate(self, requests, sampling):
                if any("two" in r.prompt[0]["content"] for r in requests):
                    raise UserError("the server refused a request")
                return super().generate(requests, sampling)

        path = tmp_path / "grades.jsonl"
        judged = grade(ModelJudge(Picky(*"444"), "scripted"), self.rows, path)
        assert [one.scores["framing"] for one in judged] == [4.0, None, 4.0]
        failed = [line for line in self.lines(path) if line["status"] == GradeStatus.FAILED]
        assert {line["error"] for line in failed} == {"UserError: the server refused a request"}

    def test_another_judge_has_another_file(self, tmp_path):
        path = tmp_path / "grades.jsonl"
        grade(self.judge(*"123")[1], self.rows[:1], path)
        for options in ({"name": "other"}, {"temperature": 0.5}, {"seed": 1}):
            with pytest.raises(UserError, match="another"):
                grade(self.judge(**options)[1], self.rows[:1], path)


def test_the_key_of_a_judge_on_a_server_is_read_when_it_is_asked_first(tmp_path, monkeypatch):
    """T29: keys come from the environment, when the judge starts; neither import nor settings read or keep one."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = JudgeSettings("server", "http://127.0.0.1:1/v1", "grader")
    with start_run(tmp_path / "run", {"judge": settings}, seed=0) as run:
        judge = judging(settings, run, load("random:llama"))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
        monkeypatch.setattr(judges, "OpenAIGenerator", lambda url, model: Keyed())
        judge([Exchange("hi", "hello")])
    assert seen == ["sk-of-this-test"]
    written = [path.read_text() for path in (tmp_path / "run").rglob("*.json*")]
    assert written
    assert not any("sk-of-this-test" in text for text in written)


class TestAgreementOfAStudysJudge:
    """T30: what a study says of its judge."""

    people = ((1, "4"), (2, "5"), (3, "1"), (4, "2"))

    def grades(self, folder):
        path = folder / "people.csv"
        rows = [f"hello {i},reply {i},framing,{score}" for i, score in self.people]
        path.write_text("\n".join(["message,reply,outcome,score", *rows]))
        return str(path)

    def test_its_repeats_and_people_stand_beside_it(self, tmp_path):
        settings = JudgeSettings("server", "u", "m", repeats=3, temperature=1.0, human=self.grades(tmp_path))
        own = [
            Judgement(dict.fromkeys(OUTCOMES, 3.0), dict.fromkeys(OUTCOMES, tuple(w)))
            for w in ("445", "111", "225")
        ]
        asked = []

        def judge(exchanges):
            asked.extend(exchanges)
            lenient = {"1": 5.0, "2": 5.0, "3": 2.0, "4": 2.0}  # half a point above people
            return [Judgement(dict.fromkeys(OUTCOMES, lenient[one.reply[-1]]), {}) for one in exchanges]

        found = judge_agreement(settings, judge, own, 0)
        assert found["repeats"]["framing"] == pytest.approx(fleiss_kappa([[4, 4, 5], [1, 1, 1], [2, 2, 5]]))
        assert set(found["people"]) == {"framing"}
        framing = found["people"]["framing"]
        assert framing.bias.estimate == pytest.approx(0.5)
        assert framing.kappa.estimate == pytest.approx(cohen_kappa([4, 5, 1, 2], [5, 5, 2, 2]))
        assert [one.turn for one in asked] == ["hello 1", "hello 2", "hello 3", "hello 4"]
        report = Report("x")
        add_judge(report, found)
        report.write(tmp_path / "page.html")
        assert "agreement with itself" in (tmp_path / "page.html").read_text()
        assert judge_agreement(JudgeSettings(), judge, own, 0) == {}

    def test_what_cannot_be_had_is_said_before_anything_is_asked(self, tmp_path):
        model = load("random:llama")
        with pytest.raises(UserError, match="absent.csv does not exist"):
            check_judge(JudgeSettings("local", model="m", human=str(tmp_path / "absent.csv")), model)
        with pytest.raises(UserError, match="needs a judge.temperature"):
            AssumptionProbingConfig(judge=JudgeSettings("local", model="m", repeats=2))


def test_a_model_that_judges_itself_is_not_loaded_twice(monkeypatch):
    """A second copy of eight billion weights does not fit beside the first."""
    model = load("random:llama")
    monkeypatch.setattr("shared.generation.hf.load", lambda config: pytest.fail(f"{config} was loaded again"))
    assert judges.start_judge(JudgeSettings("local", model="random:llama"), model).model is model
    with pytest.raises(pytest.fail.Exception, match="another was loaded"):
        judges.start_judge(JudgeSettings("local", model="another"), model)


seen: list[str] = []


class Keyed(Scripted):
    """A server's engine that notes the key it would use."""

    def __init__(self):
        super().__init__(*"123")
        seen.append(os.environ["OPENAI_API_KEY"])
