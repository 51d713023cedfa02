"""Causal closure: forced scores against a slow reference, slopes and specificity against planted answers."""

import numpy as np
import pytest
import torch

from assumptions import closing
from assumptions.chats import Chat
from assumptions.closing import closing_metrics, mediations, scores_under
from assumptions.closure import close, closure_figures
from assumptions.conditions import UNEDITED, Reply
from assumptions.dimensions import NAMES
from assumptions.forced import FORCED, forced_scores
from assumptions.instruments import instrument
from assumptions.mediation import Mediation
from assumptions.outcomes import Judgement
from assumptions.scripted import ScriptedGenerator
from assumptions.settings import AssumptionProbingConfig, JudgeSettings
from assumptions.sources import load_messages
from assumptions.steered import Steered, Steering
from assumptions.steering import Direction
from shared.errors import UserError
from shared.interventions import Add
from shared.models import load
from shared.runs import start_run


@pytest.fixture(scope="module")
def model():
    return load("tinyworld")


class TestForced:
    def test_scores_equal_a_slow_reference_under_an_edit(self, model):
        """One number at a time, no padding, no batch, the edit by a hook of its own."""
        chats = load_messages("tinyworld", 3, seed=2, columns={}).chats
        asked = instrument("tinyworld_nine")
        vector = torch.randn(256, generator=torch.Generator().manual_seed(0))
        found = forced_scores(model, asked, chats, [Add("blocks.1.output", vector, 2.0)], batch_size=2)
        ids_of = model.tokenizer.encode
        block = model.hf.model.layers[1]
        for b, chat in enumerate(chats):
            prompt = model.encode([asked.messages(chat.turn)]).rows()[0]
            written = "{"
            for k, name in enumerate(NAMES):
                before = written + f'"{name}":'
                handle = block.register_forward_hook(lambda _m, _a, out: out + 2.0 * vector)
                with torch.no_grad():
                    steps = [
                        model.hf(torch.tensor([prompt + ids_of(before + given, add_special_tokens=False)]))
                        .logits[0, -1]
                        .softmax(-1)
                        for given in ("", " 0.", " 0.5")
                    ]
                handle.remove()
                zero, one = (ids_of(":" + lead, add_special_tokens=False)[-1] for lead in (" 0", " 1"))
                digits = [ids_of(f"0.{d}", add_special_tokens=False)[-1] for d in range(10)]
                tenth, hundredth = (
                    float((step[digits] * torch.arange(10)).sum() / step[digits].sum()) for step in steps[1:]
                )
                first = steps[0][[zero, one]] / steps[0][[zero, one]].sum()
                expected = float(first[1] + first[0] * (tenth / 10 + hundredth / 100))
                assert found[b, k] == pytest.approx(expected, abs=2e-4)
                written = before + f" {FORCED}, "

    def test_instruments_of_another_form_are_refused(self, model):
        with pytest.raises(UserError, match="one number a dimension"):
            forced_scores(model, instrument("4dims"), [Chat("a", "hello")])

    def test_a_tokenizer_with_numbers_in_one_token_is_refused(self, model, monkeypatch):
        """Real tokenisers may hold "0.50" or "50" in one token: then the digits cannot be read off."""

        class Joined:
            def __call__(self, text, **_):
                spans, at = [], 0
                while at < len(text):
                    end = at + (len(FORCED) if text.startswith(FORCED, at) else 1)
                    spans.append((at, end))
                    at = end
                return {"input_ids": list(range(len(spans))), "offset_mapping": spans}

        from assumptions.forced import _places

        with pytest.raises(UserError, match="tokens of their own"):
            _places(instrument("tinyworld_nine"), Joined())


def directions(count=3):
    unit = torch.eye(12, dtype=torch.float64)
    return [Direction(f"{n}.probe", n, "probe", 1, unit[k], 1.0, 1.0) for k, n in enumerate(NAMES[:count])]


def planted_scores(effect_CK, spread_B, missing=False):
    """What a model would say whose K scores move by `effect_CK` a unit of the C directions, more in some messages."""

    def scores_under(edits):
        push_C = np.zeros(len(effect_CK))
        for one in edits:
            push_C += one.strength * one.vector_D[: len(effect_CK)].numpy()
        scores = 0.5 + np.outer(spread_B, push_C @ effect_CK)
        if missing and edits:
            scores[0] = np.nan
        return scores

    return scores_under


class TestClosure:
    effect = np.array([[0.2, 0.01, 0.0], [-0.02, -0.1, 0.0], [0.0, 0.03, 0.3]])
    spread = np.array([0.5, 1.0, 1.5])

    def test_slopes_specificity_and_rho_are_those_planted(self):
        found = close(directions(), [-1.0, 0.0, 1.0], planted_scores(self.effect, self.spread), NAMES[:3])
        np.testing.assert_allclose(found.matrix, self.effect, atol=1e-12)
        on = found.on_target()
        assert [one.estimate for one in on.values()] == pytest.approx([0.2, -0.1, 0.3])
        assert on[f"{NAMES[0]}.probe"].low == pytest.approx(0.1)
        assert list(found.off_target().values()) == pytest.approx([0.005, 0.01, 0.015])
        assert found.specificity() == pytest.approx((0.4 / 3) / 0.01)
        assert list(found.rho().values()) == pytest.approx([1.0, -1.0, 1.0])
        figures = closure_figures(found)
        assert figures["right_sign"] == 2
        assert figures["matrix"][NAMES[2]][NAMES[1]] == pytest.approx(0.03)

    def test_the_unedited_model_is_asked_once_and_missing_scores_leave_the_means(self):
        asked = []
        inner = planted_scores(self.effect, self.spread, missing=True)

        def scores_under(edits):
            asked.append(len(edits))
            return inner(edits)

        found = close(directions(), [-1.0, 0.0, 1.0], scores_under, NAMES[:3])
        assert sorted(asked) == [0] + [1] * 6
        np.testing.assert_allclose(found.matrix, self.effect * 1.25, atol=1e-12)  # of messages 1 and 2
        with pytest.raises(UserError, match="two doses"):
            close(directions(), [0.0, 0.0], scores_under, NAMES[:3])
        mute = close(directions(), [-1.0, 1.0], lambda edits: np.full((3, 3), np.nan), NAMES[:3])
        assert np.isnan(mute.matrix).all()
        assert np.isnan(closure_figures(mute)["slope_mean"])


def test_a_studys_mediation_joins_scores_and_judged_replies_by_message_and_dose(model, tmp_path):
    """Sycophancy that follows the re-elicited score alone is mediated wholly; an unjudged reply leaves its row."""
    doses, chats = [-1.0, 0.0, 1.0], [Chat(f"c{b}", f"message {b}") for b in range(12)]
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.05, (3, 12))

    def scores_under(edits):
        m = 1 if not edits else int(edits[0].strength) + 1
        return (0.5 + 0.2 * doses[m] + noise[m])[:, None].repeat(9, axis=1)

    closure = close(directions(1), doses, scores_under, NAMES)
    replies, judged = [], []
    for m, dose in enumerate(doses):
        for b, chat in enumerate(chats):
            name = UNEDITED if dose == 0 else closure.directions[0]
            replies.append(Reply(chat.id, name, dose, "x", "stop"))
            score = 3 + 2 * closure.scores_CMBK[0, m, b, 0] + 0.01 * draw.normal()
            judged.append(Judgement({"validation": None if (m, b) == (2, 3) else score, "framing": None}, {}))
    # Controls in words have dose 0 too; they are not the unedited model.
    replies += [Reply(chat.id, "words.warm", 0.0, "x", "stop") for chat in chats]
    judged += [Judgement({"validation": 1.0 + b % 5, "framing": None}, {}) for b in range(12)]
    config = AssumptionProbingConfig()
    with start_run(tmp_path / "run", {}, seed=0) as run:
        study = Steering(config, model, pytest.fail, run)
        found = mediations(study, closure, chats, Steered({}, {}, replies, judged, {}))
    one = found[closure.directions[0]]
    assert isinstance(one, Mediation)
    assert one.messages == 12
    assert one.share.estimate == pytest.approx(1.0, abs=0.1)
    assert one.direct.low < 0 < one.direct.high
    metrics = closing_metrics(closure, found)
    assert metrics["closure"]["own"]["slope"][NAMES[0]] == pytest.approx(0.2, abs=0.03)
    unread = Steered(
        {}, {}, replies, [Judgement({"validation": None, "framing": None}, {})] * len(replies), {}
    )
    assert "two messages" in mediations(study, closure, chats, unread)[closure.directions[0]]


def test_on_any_model_the_instrument_is_asked_again_under_every_edit_once(tmp_path, monkeypatch):
    """Answers lie in a file of their edit: a second study with the same edits asks nothing."""
    plain = load("random:llama")
    engine = ScriptedGenerator(instrument("nine_scores").shape(), lambda prompt: dict.fromkeys(NAMES, 0.7))
    edited = []
    monkeypatch.setattr(
        closing, "HFGenerator", lambda _, edits, batch_size: edited.append(len(edits)) or engine
    )
    chats = [Chat(f"c{b}", f"message {b}") for b in range(3)]
    config = AssumptionProbingConfig(
        "mine.csv", instrument="nine_scores", judge=JudgeSettings("local", model="x")
    )
    for asked in (9, 9):
        with start_run(tmp_path / "run", {}, seed=0) as run:
            under = scores_under(Steering(config, run.use_model(plain), pytest.fail, run), chats)
            found = close(directions(1), [-1.0, 0.0, 1.0], under, NAMES)
        assert engine.asked == asked
        assert found.scores_CMBK.shape == (1, 3, 3, 9)
        assert (found.scores_CMBK == 0.7).all()
    assert sorted(edited) == [0, 0, 1, 1, 1, 1]
    assert len(list((tmp_path / "run").glob("again-*.jsonl"))) == 3
