"""The assumption_probing pipeline: settings refused in time, exact curves, one small study and its resumption."""

from collections import Counter

import numpy as np
import pytest
import torch

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.doses import UNEDITED, Reply, dose_response, steer
from assumptions.elicitation import ElicitationSettings
from assumptions.outcomes import OUTCOMES, Judgement
from assumptions.pipeline import PIPELINE, AssumptionProbingConfig, JudgeSettings, SteeringSettings
from assumptions.scripted import ScriptedGenerator
from assumptions.sources import load_messages, moved_outcomes
from assumptions.steering import Direction
from shared.errors import UserError
from shared.generation import Completion, Sampling
from shared.models import ModelConfig, load
from shared.runs import start_run
from shared.serialize import plain, read_json
from shared.tinyworld import social


def direction(width=8, kind="probe", name="user_rightness.probe", block=1):
    unit = torch.nn.functional.one_hot(torch.tensor(2), width).double()
    return Direction(name, "user_rightness", kind, block, unit, projection_sd=0.5, resid_norm=10.0)


class TestDoseResponse:
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

    def test_a_dose_without_any_judged_reply_is_refused(self):
        rows, judged = self.replies(0.4)
        judged = [
            Judgement({"validation": None}, {}) if row.dose == 2 else one for row, one in zip(rows, judged)
        ]
        with pytest.raises(UserError, match=r"dose 2\.0"):
            dose_response(rows, judged, direction(), ["validation"])


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
        ({"data": "mine.csv"}, "judge.kind=server"),
        ({"data": "mine.csv", "judge": JudgeSettings("server")}, "judge.url"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(options, match):
    with pytest.raises(UserError, match=match):
        AssumptionProbingConfig(**options)


def test_messages_of_the_embedded_world_carry_their_truth():
    messages = load_messages("tinyworld", 30, seed=3, columns={})
    for chat, posterior in zip(messages.chats, messages.posterior_BK):
        np.testing.assert_allclose(posterior, social.posterior_mean(social.read_counts(chat.turn)))
    assert list(moved_outcomes("tinyworld", "user_rightness")) == ["framing"]
    assert list(moved_outcomes("elsewhere.csv", "user_rightness")) == list(OUTCOMES)


def test_a_small_study_and_its_resumption(tmp_path, monkeypatch):
    """The whole pipeline with an engine that answers with the posterior; the model's own activations and replies."""
    from assumptions import pipeline

    def truth(prompt):
        counts = social.read_counts(prompt.split('"')[1])
        return {name: float(score) for name, score in zip(NAMES, social.posterior_mean(counts))}

    shape = pipeline.instrument("tinyworld_nine").shape()
    engine = ScriptedGenerator(shape, truth, rates={"prose_only": 0.1})
    started = []
    monkeypatch.setattr(pipeline, "start_engine", lambda *_: started.append(1) or engine)
    steering = SteeringSettings(doses=[-2.0, 0.0, 2.0], random=1, messages=2, max_tokens=16)
    config = AssumptionProbingConfig(messages=60, shuffles=2, steering=steering)
    with start_run(tmp_path / "run", {"settings": config}, seed=0) as run:
        metrics = PIPELINE.run(config, ModelConfig("tinyworld"), run)
        run.metrics(metrics)
    health = metrics["elicitation_health"]
    assert engine.asked == 60
    assert health["clean"] + health["failed"] == 60
    assert metrics["json_valid"] == health["clean"] / 60 < 1.0
    assert metrics["spearman"] == pytest.approx(dict.fromkeys(NAMES, 1.0))
    assert set(metrics["probe"]) == set(NAMES)
    for figures in metrics["probe"].values():
        assert {"r2", "spearman", "auroc", "r2_shuffled", "block"} <= set(figures)
    names = {f"{d}{r}" for d in ("validation_seeking", "objectivity_seeking") for r in ("", "_random0")}
    assert set(metrics["dose_response_rho"]) == set(metrics["dose_response_slope"]) == names
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    assert read_json(tmp_path / "run" / "metrics.json")["spearman"]["user_rightness"] == pytest.approx(1.0)

    engine.rates = {}
    stages = read_json(tmp_path / "run" / "stages.json")
    with start_run(tmp_path / "run", {"settings": config}, seed=0) as run:
        again = PIPELINE.run(config, ModelConfig("tinyworld"), run)
    assert engine.asked == 60 + health["failed"]
    assert again["json_valid"] == 1.0
    with start_run(tmp_path / "run", {"settings": config}, seed=0) as run:
        assert plain(PIPELINE.run(config, ModelConfig("tinyworld"), run)) == plain(again)
    assert len(started) == 2  # nothing was left to ask the third time
    assert (
        read_json(tmp_path / "run" / "stages.json")["features.safetensors"] == stages["features.safetensors"]
    )


def test_own_messages_with_a_judge_on_a_server(tmp_path, monkeypatch):
    """A file of chats, no truth known, replies judged by a model; a resumed run asks neither engine nor judge."""
    from assumptions import pipeline

    path = tmp_path / "mine.csv"
    turns = [turn.text for turn in social.sample_turns(40, seed=9)]
    path.write_text("prompt\n" + "".join(f"{turn}\n" for turn in turns))

    def truth(prompt):
        counts = social.read_counts(prompt.split("<message>")[2].split("</message>")[0])
        return {name: float(score) for name, score in zip(NAMES, social.posterior_mean(counts))}

    asked = []

    class Grader:
        def generate(self, requests, sampling):
            asked.extend(requests)
            return [[Completion("4" if len(asked) % 2 else "no grade", [], [], "stop")] for _ in requests]

        def close(self):
            pass

    engine = ScriptedGenerator(pipeline.instrument("nine_scores").shape(), truth)
    monkeypatch.setattr(pipeline, "start_engine", lambda *_: engine)
    monkeypatch.setattr(pipeline, "start_judge", lambda *_: Grader())
    steering = SteeringSettings(
        ["user_rightness"], doses=[-1.0, 0.0, 1.0], random=0, messages=3, max_tokens=3
    )
    judge = JudgeSettings("server", "http://127.0.0.1:1/v1", "grader")
    config = AssumptionProbingConfig(
        str(path), {"text": "prompt"}, 40, "nine_scores", shuffles=1, steering=steering, judge=judge
    )
    for _ in range(2):
        with start_run(tmp_path / "run", {"settings": config}, seed=0) as run:
            metrics = PIPELINE.run(config, ModelConfig("random:llama"), run)
    assert engine.asked == 40
    assert len(asked) == 3 * 3 * 3  # doses, messages, outcomes; once
    assert "spearman" not in metrics
    assert metrics["json_valid"] == 1.0
    assert set(metrics["probe"]) == set(NAMES)
    assert metrics["slope_over_largest_random"] == {"user_rightness": None}
