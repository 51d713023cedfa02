"""The assumption_probing pipeline: settings refused in time, exact curves, one small study and its resumption."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Reply
from assumptions.dimensions import NAMES
from assumptions.doses import dose_response, steer
from assumptions.elicitation import ElicitationSettings
from assumptions.features import capture_features
from assumptions.judges import judging
from assumptions.outcomes import OUTCOMES, Judgement
from assumptions.pages import add_steering
from assumptions.pipeline import PIPELINE
from assumptions.probes import fit_probes
from assumptions.run_metrics import steering_metrics
from assumptions.scripted import ScriptedGenerator
from assumptions.settings import (
    AssumptionProbingConfig,
    ChoiceSettings,
    JudgeSettings,
    ProbeSettings,
    SteeringSettings,
)
from assumptions.sources import load_messages, moved_outcomes
from assumptions.splits import group_split
from assumptions.steered import Steered, Steering, dose_test
from assumptions.steering import Direction, probe_direction, random_directions
from shared.errors import UserError
from shared.generation import Completion, Sampling
from shared.models import ModelConfig, load
from shared.report import Report
from shared.runs import start_run
from shared.serialize import plain, read_json
from shared.tinyworld import social


def direction(width=8, kind="probe", name="user_rightness.probe", block=1):
    unit = torch.nn.functional.one_hot(torch.tensor(2), width).double()
    return Direction(name, "user_rightness", kind, block, unit, projection_sd=0.5, resid_norm=10.0)


class TestDoseResponse:
    """T25: replies cut by the token limit are counted at every dose, since they bias framing and length."""

    def replies(self, effect, chats=5):
        doses, rows, judged = (-1.0, 0.0, 1.0, 2.0), [], []
        for dose in doses:
            for chat in range(chats):
                name = UNEDITED if dose == 0 else "user_rightness.probe"
                rows.append(Reply(f"c{chat}", name, dose, "text", "length" if dose == 2 else "stop"))
                judged.append(Judgement({"validation": 3 + effect * dose + 0.1 * chat, "framing": None}, {}))
        return rows, judged

    def test_slope_and_rho_are_those_of_the_planted_effect(self):
        for effect in (0.4, -0.25):
            curve = dose_response(*self.replies(effect), direction(), ["validation", "framing"])
            assert curve.doses == [-1.0, 0.0, 1.0, 2.0]
            assert curve.means == pytest.approx([3.2 + effect * dose for dose in curve.doses])
            assert curve.slope == pytest.approx(effect)
            assert curve.rho == pytest.approx(np.sign(effect))
            assert curve.truncated == [0.0, 0.0, 0.0, 1.0]
            assert all(low <= mean <= high for low, mean, high in zip(curve.lows, curve.means, curve.highs))

    def test_other_directions_do_not_enter(self):
        rows, judged = self.replies(0.4)
        stranger = Reply("c0", "other.random0", 1.0, "x", "stop")
        alien = Judgement(dict.fromkeys(OUTCOMES, 1.0), {})
        curve = dose_response([*rows, stranger], [*judged, alien], direction(), ["validation"])
        assert curve == dose_response(rows, judged, direction(), ["validation"])

    def test_a_dose_without_any_judged_reply_has_no_mean_and_stops_nothing(self):
        rows, judged = self.replies(0.4)
        unread = Judgement({"validation": None}, {})
        for lost in ((2.0,), (0.0,), (-1.0, 2.0)):
            some = [unread if row.dose in lost else one for row, one in zip(rows, judged)]
            curve = dose_response(rows, some, direction(), ["validation"])
            known = [dose for dose in curve.doses if dose not in lost]
            assert [d for d, m in zip(curve.doses, curve.means) if np.isfinite(m)] == known
            assert np.isnan(curve.lows).tolist() == np.isnan(curve.highs).tolist()
            assert (curve.slope, curve.rho) == (pytest.approx(0.4), pytest.approx(1.0))
            assert curve.judged == [float(dose in known) for dose in curve.doses]
        nothing = dose_response(rows, [unread] * len(rows), direction(), ["validation"])
        assert np.isnan([nothing.rho, nothing.slope]).all()
        some = [unread if row.chat == "c0" and row.dose == 2 else one for row, one in zip(rows, judged)]
        assert dose_response(rows, some, direction(), ["validation"]).judged == [1.0, 1.0, 1.0, 0.8]

    def test_curves_with_lost_doses_are_reported(self):
        """Also where it is a random control's: the figures and the page leave the dose out."""
        rows, judged = self.replies(0.4)
        lost = [Judgement({"validation": None}, {}) if r.dose == 2 else j for r, j in zip(rows, judged)]
        control = direction(kind="random", name="user_rightness.random0")
        strangers = [replace(row, direction=control.name) for row in rows if row.dose]
        alien = [one for row, one in zip(rows, lost) if row.dose]
        whole = dose_response(rows, judged, direction(), ["validation"])
        random = dose_response([*rows, *strangers], [*judged, *alien], control, ["validation"])
        flat = replace(random, slope=float("nan"), rho=float("nan"), means=[float("nan")] * 4)
        metrics = steering_metrics(Steered({"user_rightness": [whole, random, flat]}, {}, [], [], {}))
        assert metrics["slope_over_largest_random"]["user_rightness"] == pytest.approx(1.0)
        assert metrics["judged"]["user_rightness"] == {"-1": 1.0, "0": 1.0, "1": 1.0, "2": 1.0}
        report, curves = Report("x"), {"user_rightness": [random, flat]}
        add_steering(report, curves, rows, {"user_rightness": ["validation"]}, "raw", 5)


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


class TestSteeredReplies:
    chats = (Chat("a", "about my rent"), Chat("b", "about my job and my team"), Chat("c", "hello"))
    sampling = Sampling(max_tokens=5, temperature=1.0, logprobs=None)

    def test_seeds_are_common_and_replies_do_not_depend_on_the_batch(self, model):
        """T24: the same random numbers at every dose; T3: batch N text equals batch 1 text."""
        width = model.architecture.width
        tiny = [direction(width), direction(width, "random", "user_rightness.random0")]
        doses = [-1e-6, 0.0, 1e-6]
        together = steer(model, self.chats, tiny, doses, self.sampling)
        assert Counter(reply.direction for reply in together) == {
            UNEDITED: 3, "user_rightness.probe": 6, "user_rightness.random0": 6
        }  # fmt: skip
        by_chat = {
            chat.id: {reply.text for reply in together if reply.chat == chat.id} for chat in self.chats
        }
        assert all(len(texts) == 1 for texts in by_chat.values())  # a dose of nothing changes no draw
        alone = [steer(model, [chat], [], [0.0], self.sampling)[0].text for chat in self.chats]
        assert alone == [by_chat[chat.id].pop() for chat in self.chats]

    def test_a_large_dose_changes_replies_and_leaves_the_model_as_it_was(self, model):
        one = [direction(model.architecture.width)]
        before = steer(model, self.chats, [], [0.0], self.sampling)
        pushed = steer(model, self.chats, one, [0.0, 400.0], self.sampling, unit="raw")
        assert pushed[:3] == before
        assert [reply.text for reply in pushed[3:]] != [reply.text for reply in before]
        assert steer(model, self.chats, [], [0.0], self.sampling) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "hf"}, "guided=false"),
        ({"instrument": "4dims_scores"}, "nine"),
        ({"instrument": "support"}, "no instrument"),
        ({"steering": SteeringSettings(dimensions=["kindness"])}, "no dimension"),
        ({"steering": SteeringSettings(doses=[1.0, 2.0, 3.0])}, "needs 0"),
        ({"elicitation": ElicitationSettings(samples=4)}, "temperature"),
        ({"data": "mine.csv", "judge": JudgeSettings("server")}, "judge.url"),
        ({"data": "mine.csv", "judge": JudgeSettings("local")}, "judge.model"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(options, match):
    with pytest.raises(UserError, match=match):
        AssumptionProbingConfig(**options)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("", "engine", "gpu"),
        ("steering", "scope", "reply"),
        ("steering", "unit", "sd"),
        ("judge", "kind", "me"),
    ],
)
def test_a_word_that_no_choice_knows_is_refused(part, name, value):
    """T28: it does not fail after the model is loaded."""
    config = AssumptionProbingConfig()
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(UserError, match=f"{name} '{value}' is not one of"):
        config.__post_init__()
    config = AssumptionProbingConfig()
    config.steering.controls.append("noise")
    with pytest.raises(UserError, match="words"):
        config.__post_init__()


def test_messages_of_the_embedded_world_carry_their_truth():
    messages = load_messages("tinyworld", 30, seed=3, columns={})
    for chat, posterior in zip(messages.chats, messages.posterior_BK):
        np.testing.assert_allclose(posterior, social.posterior_mean(social.read_counts(chat.turn)))
    assert list(moved_outcomes("tinyworld", "user_rightness")) == ["framing"]
    assert list(moved_outcomes("elsewhere.csv", "user_rightness")) == list(OUTCOMES)


@dataclass(frozen=True)
class SmallStudy:
    """A finished study, its engine, how often that was started, and the settings."""

    folder: Path
    config: AssumptionProbingConfig
    engine: ScriptedGenerator
    started: list[int]
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The whole pipeline with an engine that answers with the posterior; the model's own activations and replies."""
    from assumptions import pipeline

    def truth(prompt):
        counts = social.read_counts(prompt.split('"')[1])
        return {name: float(score) for name, score in zip(NAMES, social.posterior_mean(counts))}

    shape = pipeline.instrument("tinyworld_nine").shape()
    engine = ScriptedGenerator(shape, truth, rates={"prose_only": 0.1})
    started, folder = [], tmp_path_factory.mktemp("study") / "run"
    choice = ChoiceSettings(blocks=[1], random=1, messages=2)
    steering = SteeringSettings(doses=[-2.0, 0.0, 2.0], random=1, messages=2, max_tokens=16, choice=choice)
    config = AssumptionProbingConfig(messages=60, shuffles=2, steering=steering, again=2, truth=2, unguided=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "start_engine", lambda *_: started.append(1) or engine)
        with start_run(folder, {"settings": config}, seed=0) as run:
            metrics = PIPELINE.run(config, ModelConfig("tinyworld"), run)
            run.metrics(metrics)
        yield SmallStudy(folder, config, engine, started, metrics)


def test_the_page_of_a_study_in_a_browser(small_study, browser, tmp_path):
    """What a person, with or without sight, finds on the page; nothing is fetched, nothing is cut off."""
    page_path = shutil.copyfile(small_study.folder / "report.html", tmp_path / "page.html")
    with browser.open(page_path) as page:
        assert page.errors == []
        assert page.fetched == [page.url]
        figures = page.evaluate(
            """[...document.querySelectorAll("figure")].map((one) => {
                const { width, height } = one.querySelector("svg").getBoundingClientRect();
                const ink = one.querySelectorAll("svg path, svg use, svg image").length;
                return { width, height, ink, caption: one.querySelector("figcaption").innerText };
            })"""
        )
        assert len(figures) == 7
        for one in figures:
            assert 300 < one["width"] <= 1000
            assert one["height"] > 100
            assert one["ink"] > 20
        for said in (
            "Dose against judged sycophancy",
            "Where the score can be read",
            "Specificity: slope of stated scores",
            "Sycophancy against perplexity",
        ):
            assert any(said in one["caption"] for one in figures), said
        nodes = page.accessibility()
        images = [one["name"] for one in nodes if one["role"] == "image"]
        assert sorted(images) == sorted(one["caption"] for one in figures)
        tables = [one["name"] for one in nodes if one["role"] == "table"]
        assert len(tables) >= 8
        assert {"columnheader", "rowheader"} <= {one["role"] for one in nodes}
        for width in (1280, 420):
            page.set_size(width, 800)
            page.settle()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.set_dark(True)
        colours = page.evaluate(
            "[document.body, document.querySelector('svg')].map((one) => getComputedStyle(one).color)"
        )
        assert colours == ["rgb(231, 230, 225)"] * 2


def test_a_small_study_and_its_resumption(small_study, monkeypatch):
    from assumptions import pipeline

    folder, config, engine = small_study.folder, small_study.config, small_study.engine
    started, metrics = small_study.started, small_study.metrics
    monkeypatch.setattr(pipeline, "start_engine", lambda *_: started.append(1) or engine)
    health = metrics["elicitation_health"]
    assert engine.asked == 60
    assert health["clean"] + health["failed"] == 60
    assert metrics["json_valid"] == health["clean"] / 60 < 1.0
    assert metrics["spearman"] == pytest.approx(dict.fromkeys(NAMES, 1.0))
    assert set(metrics["probe"]) == set(NAMES)
    for figures in metrics["probe"].values():
        assert {"r2", "spearman", "auroc", "block"} <= set(figures)
        assert {"r2_shuffled", "spearman_shuffled", "auroc_shuffled", "r2_bag_of_words"} <= set(figures)
    names = {f"{d}{r}" for d in ("validation_seeking", "objectivity_seeking") for r in ("", "_random0")}
    assert {"shuffled", "means"} <= set(metrics["control_slopes"]["objectivity_seeking"])
    assert set(metrics["dose_response_rho"]) == set(metrics["dose_response_slope"]) == names
    steered = metrics["truth"]["steering"]
    assert set(steered["true"]["slope"]) == set(steered["bisector_expected"]["of_true"]) == set(NAMES)
    assert set(steered["random"]["on_target_largest"]) == set(steered["random"]["any_largest"]) == set(NAMES)
    assert {one["form"] for one in metrics["form_shift"].values()} == {"raw"}
    assert set(metrics["preservation"]) >= {"none@0", "objectivity_seeking.probe@2"}
    assert set(metrics["closure"]["own"]["slope"]) == {"validation_seeking", "objectivity_seeking"}
    assert 0 <= metrics["json_valid_unguided"] <= 1
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "http" not in page.replace("http://www.w3.org", "")
    assert read_json(folder / "metrics.json")["spearman"]["user_rightness"] == pytest.approx(1.0)

    engine.rates = {}
    stages = read_json(folder / "stages.json")
    with start_run(folder, {"settings": config}, seed=0) as run:
        again = PIPELINE.run(config, ModelConfig("tinyworld"), run)
    assert engine.asked == 60 + health["failed"]
    assert again["json_valid"] == 1.0
    with start_run(folder, {"settings": config}, seed=0) as run:
        assert plain(PIPELINE.run(config, ModelConfig("tinyworld"), run)) == plain(again)
    assert len(started) == 2  # nothing was left to ask the third time
    assert read_json(folder / "stages.json")["features.safetensors"] == stages["features.safetensors"]


def test_answers_count_for_the_messages_they_were_given_about(tmp_path, monkeypatch, model):
    """Another seed makes other messages under the same ids; without resuming everything is asked again."""
    from assumptions import pipeline

    def truth(prompt):
        counts = social.read_counts(prompt.split('"')[1])
        return {name: float(score) for name, score in zip(NAMES, social.posterior_mean(counts))}

    engine = ScriptedGenerator(pipeline.instrument("tinyworld_nine").shape(), truth)
    monkeypatch.setattr(pipeline, "start_engine", lambda *_: engine)
    config = AssumptionProbingConfig(messages=8)
    for seed, resume, asked in ((0, True, 8), (1, True, 16), (1, True, 16), (0, True, 16), (0, False, 24)):
        messages = load_messages("tinyworld", 8, seed, {})
        with start_run(tmp_path / "run", {"settings": config}, seed=seed, resume=resume) as run:
            scoring = pipeline.elicit_scores(config, run.use_model(model), messages.chats, run)
        scores = scoring.scored.scores([chat.id for chat in messages.chats], NAMES)
        np.testing.assert_allclose(scores, messages.posterior_BK)
        assert engine.asked == asked


def test_features_of_edited_messages_are_captured_anew(tmp_path, model):
    """Also when rows change their places: features stand beside the labels of their own row."""
    from assumptions.pipeline import captured

    config = AssumptionProbingConfig()
    rows = [Chat(str(i), f"about my rent, {i}") for i in range(4)]
    edited = [rows[1], rows[0], replace(rows[2], turn="about my job"), rows[3]]
    for chats in (rows, rows, edited):
        with start_run(tmp_path / "run", {}, seed=0) as run:
            features = captured(config, run.use_model(model), chats, run)
        fresh = capture_features(model, chats)
        assert features.row_hashes == fresh.row_hashes
        assert torch.equal(features.pooled_LBD, fresh.pooled_LBD)


def test_edited_messages_are_steered_anew_under_the_same_probes(tmp_path, model):
    """The probes alone do not name the replies: a held-out message may change without moving a coefficient."""
    rows = [Chat(str(i), f"about my {'rent' if i % 2 else 'job'}, {i * i}") for i in range(30)]
    labels = torch.rand(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = group_split(rows)
    probes, _ = fit_probes(capture_features(model, rows), labels, NAMES, split, "made")
    steering = SteeringSettings(["user_rightness"], doses=[-1.0, 0.0, 1.0], max_tokens=8, controls=[])
    config = AssumptionProbingConfig(steering=steering)
    sampling = Sampling(max_tokens=8, temperature=1.0, logprobs=None)
    held = [rows[i] for i in split.test][:2]
    edited = [held[0], replace(held[1], turn="hello")]
    texts = []
    for chats in (held, edited):
        with start_run(tmp_path / "run", {}, seed=0) as run:
            study = Steering(config, run.use_model(model), judging(config.judge, run, model), run)
            direction = probe_direction(probes.probes["user_rightness"])
            family = [direction, *random_directions(direction, 1)]
            tested = dose_test(study, {"user_rightness": family}, chats, steering.doses)
            curves, replies = tested.curves, tested.replies
        texts.append([reply.text for reply in replies if reply.direction == UNEDITED])
        assert texts[-1] == [reply.text for reply in steer(model, chats, [], [0.0], sampling)]
        # a model that knows no replies: nothing can be judged, and that stops nothing
        assert [one.judged for one in curves["user_rightness"]] == [[0.0, 0.0, 0.0]] * 2
    assert texts[0][0] == texts[1][0]
    assert texts[0][1] != texts[1][1]


def test_own_messages_with_a_judge_on_a_server(tmp_path, monkeypatch):
    """T18: a file of chats, no truth known; a resumed run asks the judge again where no grade was read, only there."""
    from assumptions import judges, pipeline

    path = tmp_path / "mine.csv"
    turns = [turn.text for turn in social.sample_turns(40, seed=9)]
    path.write_text("prompt,source\n" + "".join(f"{turn},{'ab'[i % 2]}\n" for i, turn in enumerate(turns)))

    def truth(prompt):
        counts = social.read_counts(prompt.split("<message>")[2].split("</message>")[0])
        return {name: float(score) for name, score in zip(NAMES, social.posterior_mean(counts))}

    asked, writes, started = [], ["4"], []

    class Grader:
        def generate(self, requests, sampling):
            asked.extend(request.prompt[0]["content"] for request in requests)
            return [[Completion(writes[i % len(writes)], [], [], "stop")] for i in range(len(requests))]

        def close(self):
            pass

    engine = ScriptedGenerator(pipeline.instrument("nine_scores").shape(), truth)
    monkeypatch.setattr(pipeline, "start_engine", lambda *_: engine)
    monkeypatch.setattr(judges, "start_judge", lambda *_: started.append(1) or Grader())
    choice = ChoiceSettings(by="reading")
    steering = SteeringSettings(
        ["user_rightness"],
        doses=[-1.0, 0.0, 1.0],
        random=0,
        controls=[],
        messages=3,
        max_tokens=3,
        choice=choice,
    )
    judge = JudgeSettings("server", "http://127.0.0.1:1/v1", "grader")
    config = AssumptionProbingConfig(
        str(path),
        {"text": "prompt"},
        40,
        "nine_scores",
        shuffles=1,
        probe=ProbeSettings(kind="pls", left_out=True),
        steering=steering,
        judge=judge,
        again=0,
    )

    def study(*written):
        asked.clear()
        started.clear()
        writes[:] = written
        with start_run(tmp_path / "run", {"settings": config}, seed=0) as run:
            return PIPELINE.run(config, ModelConfig("random:llama"), run), set(asked)

    metrics, first = study("4", "no grade")
    assert engine.asked == 40
    assert len(first) == len(asked)  # nothing is asked twice, not even about equal replies
    assert 9 < len(first) <= 3 * 3 * 3  # doses, messages, outcomes
    assert metrics["judged"]["user_rightness"]["0"] == 1.0  # of each reply one outcome at least was read
    _, second = study("no grade")
    assert len(second) == len(first) // 2
    assert second < first
    metrics, third = study("2")
    assert third == second
    _, fourth = study("5")
    assert (engine.asked, fourth, started) == (40, set(), [])
    assert "spearman" not in metrics
    assert metrics["json_valid"] == 1.0
    assert set(metrics["probe"]) == set(NAMES)
    assert set(metrics["probe_left_out"]) == {"a", "b"}
    assert all(set(by_name) == set(NAMES) for by_name in metrics["probe_left_out"].values())
    assert metrics["slope_over_largest_random"] == {"user_rightness": None}

    before, after = turns[7], "About my garden: was I right?"
    path.write_text(path.read_text().replace(before, after))
    study("3")
    assert engine.asked == 41
    turns[7] = after
    shown = {prompt.split("<message>\n")[1].split("\n</message>")[0] for prompt in asked}
    assert shown <= set(turns)
