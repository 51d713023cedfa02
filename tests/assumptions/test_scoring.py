"""Scores three ways by one setting: what each takes from the answers, and what is refused before anything is asked."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from assumptions import pipeline
from assumptions.chats import Chat
from assumptions.closing import scores_under
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings
from assumptions.instruments import instrument
from assumptions.judges import judging
from assumptions.scoring import expected_path, score_chats
from assumptions.scripted import ScriptedGenerator
from assumptions.settings import AssumptionProbingConfig
from assumptions.sources import load_messages
from assumptions.steered import Steering
from shared.errors import UserError
from shared.generation import Completion, HFGenerator, OpenAIGenerator
from shared.models import ModelConfig, load
from shared.runs import start_run

ASK = instrument("nine_scores")
FREE = ElicitationSettings(guided=False, max_tokens=96)


@pytest.mark.parametrize(
    ("score", "samples", "match"),
    [("stated", 3, "go with score mean"), ("mean", 1, "set samples above 1")],
)
def test_a_kind_of_score_that_does_not_fit_is_refused_with_the_settings(score, samples, match):
    settings = replace(FREE, samples=samples, temperature=1.0)
    with pytest.raises(UserError, match=match):
        AssumptionProbingConfig(engine="hf", elicitation=settings, score=score)


def test_an_engine_that_tells_no_tokens_is_refused_before_it_is_asked_for_an_answer(tmp_path):
    model = load("random:llama")
    mute = ScriptedGenerator(ASK.shape(), lambda prompt: dict.fromkeys(NAMES, 0.5))

    def run(generator):
        path = tmp_path / "answers.jsonl"
        return score_chats(
            generator, model.tokenizer, ASK, [Chat("a", "hi")], path, FREE, "expected", model="m"
        )

    class Without(ScriptedGenerator):
        def generate(self, requests, sampling):
            self.asked += len(requests)
            return [[Completion("x", [], [], "length")] for _ in requests]

    without = Without(mute.shape, mute.scores_of)
    with pytest.raises(UserError, match="expected scores need an engine that tells token ids"):
        run(without)
    assert without.asked == 2
    assert not (tmp_path / "answers.jsonl").exists()

    class Other(Without):
        """Renders messages in another way than the tokenizer: its first token is another one."""

        def generate(self, requests, sampling):
            tokens = [1 + isinstance(request.prompt[0], int) for request in requests]
            return [[Completion("x", [token], [0.0], "length", [{token: -0.5}])] for token in tokens]

    with pytest.raises(UserError, match="is not the one that the engine uses"):
        run(Other(mute.shape, mute.scores_of))


def test_a_server_without_token_ids_is_refused_in_one_line(monkeypatch, tmp_path):
    cards = SimpleNamespace(list=lambda: [SimpleNamespace(id="m", owned_by="somebody")])
    monkeypatch.setattr("openai.OpenAI", lambda **_: SimpleNamespace(models=cards, close=lambda: None))
    with (
        OpenAIGenerator("http://127.0.0.1:9/v1", "m", "key") as server,
        pytest.raises(UserError, match="which only vLLM servers tell"),
    ):
        tokenizer = load("random:llama").tokenizer
        score_chats(server, tokenizer, ASK, [Chat("a", "hi")], tmp_path / "a", FREE, "expected", model="m")


@pytest.fixture(scope="module")
def model():
    return load("tinyworld")


def test_the_pipeline_takes_its_labels_from_the_setting(model, tmp_path):
    """Expected scores lie near the posterior mean, stated ones are draws; a rerun asks nothing."""
    messages = load_messages("tinyworld", 2, seed=5, columns={})
    ids = [chat.id for chat in messages.chats]
    found = {}
    for score, samples in (("stated", 1), ("mean", 2), ("expected", 1)):
        settings = replace(FREE, temperature=1.0, samples=samples)
        config = AssumptionProbingConfig(engine="hf", score=score, elicitation=settings)
        with start_run(tmp_path / "run", {}, 0) as run:
            found[score] = pipeline.elicit_scores(config, run.use_model(model), messages.chats, run)
    tables = {score: one.scored.scores(ids, NAMES) for score, one in found.items()}
    error = {score: np.sqrt(np.mean((table - messages.posterior_BK) ** 2)) for score, table in tables.items()}
    assert error["expected"] < 0.05 < error["mean"]
    assert error["expected"] < 0.1 < error["stated"]
    assert len(found["mean"].answers.records) == 4
    assert set(np.round(tables["stated"].ravel() * 20, 6)) <= set(np.arange(21.0))
    with start_run(tmp_path / "run", {}, 0) as run:
        again = pipeline.elicit_scores(config, run.use_model(model), messages.chats, run)
    assert again.scored.scores(ids, NAMES).tolist() == tables["expected"].tolist()
    assert len(list((tmp_path / "run").glob("*.expected.jsonl"))) == 1


def test_scores_under_edits_are_of_the_same_kind(monkeypatch, tmp_path):
    """Elicited again, a message is scored as the labels were: no stated scores beside expected ones."""
    asked = []

    def noted(generator, tokenizer, instrument, chats, path, settings, score, *, model):
        asked.append((score, settings.guided))
        return SimpleNamespace(scored=SimpleNamespace(scores=lambda ids, names: np.zeros((1, 9))))

    monkeypatch.setattr("assumptions.closing.score_chats", noted)
    config = AssumptionProbingConfig(
        instrument="nine_scores", engine="hf", elicitation=FREE, score="expected"
    )
    stranger = load(ModelConfig("random:llama"))
    with start_run(tmp_path / "run", {}, 0) as run:
        study = Steering(config, stranger, judging(config.judge, run, stranger), run)
        assert scores_under(study, [Chat("a", "hi")])(()).shape == (1, 9)
    assert asked == [("expected", False)]


def test_answers_with_and_without_tokens_lie_in_files_of_their_own(model, tmp_path):
    chats = load_messages("tinyworld", 1, seed=5, columns={}).chats
    generator = HFGenerator(model)

    def run(score):
        path = tmp_path / "answers.jsonl"
        score_chats(
            generator,
            model.tokenizer,
            instrument("tinyworld_nine"),
            chats,
            path,
            FREE,
            score,
            model="m",
        )
        return path

    run("stated")
    with pytest.raises(UserError, match="another keep_tokens"):
        run("expected")
    assert not expected_path(tmp_path / "answers.jsonl").exists()
