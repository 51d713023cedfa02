"""Intraclass correlations against the textbook and brute force; the facets on a scripted engine."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings
from assumptions.instruments import instrument
from assumptions.intraclass import intraclass, mean_squares
from assumptions.reliability import compare, orders, paraphrased, paraphrases, reliability, retests
from assumptions.scripted import ScriptedGenerator
from shared.errors import UserError
from shared.generation import Completion

NINE = instrument("nine_scores")
FREE = ElicitationSettings(guided=False, temperature=1.0)
# Shrout and Fleiss 1979, table 2: six subjects, four judges
TEXTBOOK = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=float
)


def test_the_example_of_shrout_and_fleiss():
    result = intraclass(TEXTBOOK)
    assert result.agreement == pytest.approx((0.2898, 0.0188, 0.7611), abs=5e-4)
    assert result.consistency == pytest.approx((0.7148, 0.3425, 0.9459), abs=5e-4)
    assert mean_squares(TEXTBOOK) == pytest.approx((11.2417, 32.4861, 1.0194), abs=1e-3)


def brute_force(values):
    """The analysis of variance by its definition, cell by cell."""
    n, k = values.shape
    cells = [(i, j, values[i, j]) for i in range(n) for j in range(k)]
    grand = sum(v for _, _, v in cells) / (n * k)
    row = {i: sum(v for a, _, v in cells if a == i) / k for i in range(n)}
    column = {j: sum(v for _, b, v in cells if b == j) / n for j in range(k)}
    msr = sum((row[i] - grand) ** 2 for i, _, _ in cells) / (n - 1)
    msc = sum((column[j] - grand) ** 2 for _, j, _ in cells) / (k - 1)
    total = sum((v - grand) ** 2 for _, _, v in cells)
    mse = (total - msr * (n - 1) - msc * (k - 1)) / ((n - 1) * (k - 1))
    return msr, msc, mse


@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 1000))
@settings(deadline=None)
def test_against_a_brute_force_analysis_of_variance(n, k, seed):
    values = np.random.default_rng(seed).normal(size=(n, k))
    msr, msc, mse = brute_force(values)
    assert mean_squares(values) == pytest.approx((msr, msc, mse), rel=1e-8, abs=1e-12)
    result = intraclass(values)
    assert result.agreement.estimate == pytest.approx(
        (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    )
    assert result.consistency.estimate == pytest.approx((msr - mse) / (msr + (k - 1) * mse))
    for interval in (result.agreement, result.consistency):
        assert interval.low <= interval.estimate + 1e-9
        assert interval.estimate <= interval.high + 1e-9


def test_intervals_hold_what_they_promise():
    """Of simulated tables with a known coefficient, about 95% of the intervals contain it."""
    rng, truth, runs = np.random.default_rng(0), 0.6, 400
    held = 0
    for _ in range(runs):
        values = np.sqrt(truth) * rng.normal(size=(20, 1)) + np.sqrt(1 - truth) * rng.normal(size=(20, 3))
        interval = intraclass(values).consistency
        held += interval.low <= truth <= interval.high
    assert 0.92 <= held / runs <= 0.98


def test_a_shift_of_one_condition_counts_for_agreement_only():
    values = np.random.default_rng(1).random((30, 1)) + np.array([[0.0, 0.5, 1.0]])
    result = intraclass(values + 1e-3 * np.random.default_rng(2).normal(size=values.shape))
    assert result.consistency.estimate > 0.99
    assert result.agreement.estimate < 0.5


def test_scores_that_never_move_have_no_reliability():
    result = intraclass(np.full((10, 3), 0.8))
    assert np.isnan(result.agreement.estimate)
    assert np.isnan(result.consistency.low)
    perfect = intraclass(np.repeat(np.arange(5.0)[:, None], 2, axis=1))
    assert perfect.agreement == perfect.consistency == (1.0, 1.0, 1.0)


def test_what_cannot_be_correlated_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        intraclass(np.zeros((1, 3)))
    with pytest.raises(UserError, match="no missing cells"):
        intraclass(np.array([[0.0, np.nan], [1.0, 1.0]]))


def chats(count, text="message"):
    return [Chat(f"c{i:02}", f"{text} {i}") for i in range(count)]


class NoisyEngine(ScriptedGenerator):
    """Scores are a number of the message plus a deviation that hangs on the request's seed or on what comes first."""

    noise = 0.0
    by_order = False

    def _complete(self, request):
        import json

        text = request.prompt[-1]["content"]
        number = int("".join(c for c in text.split("<message>\n")[1].split("\n</message>")[0] if c.isdigit()))
        first = min(NAMES, key=lambda name: text.index(f"- {name}:"))
        drawn = np.random.default_rng(
            [request.seed, number] if not self.by_order else [NAMES.index(first), number]
        )
        scores = {n: round(float(np.clip(number / 40 + self.noise * drawn.normal(), 0, 1)), 4) for n in NAMES}
        return Completion(json.dumps(scores), [], [], "stop")


def engine(noise, by_order=False):
    generator = NoisyEngine(NINE.shape(), lambda _: {})
    generator.noise, generator.by_order = noise, by_order
    return generator


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_retest_finds_the_planted_reliability(tmp_path, noise):
    rows = chats(40)
    result = reliability(engine(noise), NINE, "retest", retests(rows, FREE, 3), tmp_path, model="m")
    truth = np.var(np.arange(40) / 40)
    planted = truth / (truth + noise**2)  # clipping at 0 and 1 moves it a little
    for value in result.by_dimension.values():
        assert value.agreement.estimate == pytest.approx(planted, abs=0.2)
        assert (value.subjects, value.conditions) == (40, 3)
    mean = np.mean([value.agreement.estimate for value in result.by_dimension.values()])
    assert mean == pytest.approx(planted, abs=0.12)
    table = result.rows()
    assert [row["dimension"] for row in table] == list(NAMES)
    assert {"ICC(2,1)", "ICC(3,1) from", "chats left out"} <= set(table[0])


def test_orders_are_different_and_the_instrument_s_own_is_first(tmp_path):
    conditions = orders(chats(30), NINE, replace(FREE, temperature=0.0), 4)
    drawn = [condition.settings.order for condition in conditions]
    assert drawn[0] == NAMES
    assert len(set(drawn)) == 4
    assert drawn == [c.settings.order for c in orders(chats(30), NINE, replace(FREE, temperature=0.0), 4)]
    steady = reliability(engine(0.2), NINE, "order", conditions, tmp_path / "a", model="m")
    moved = reliability(engine(0.2, by_order=True), NINE, "order", conditions, tmp_path / "b", model="m")
    mean = lambda r: np.mean([v.agreement.estimate for v in r.by_dimension.values()])  # noqa: E731
    assert mean(steady) == pytest.approx(1.0)  # the same seed under every order
    assert mean(moved) < 0.9
    with pytest.raises(UserError, match="no 7 orders of its 1"):
        orders(chats(2), replace(NINE, dimensions=NAMES[:1]), FREE, 7)


def test_a_finished_study_asks_nothing_again(tmp_path):
    first = engine(0.1)
    one = reliability(first, NINE, "retest", retests(chats(5), FREE), tmp_path, model="m")
    again = engine(0.1)
    assert reliability(again, NINE, "retest", retests(chats(5), FREE), tmp_path, model="m") == one
    assert again.asked == 0


def test_paraphrases(tmp_path):
    class Rewriter:
        def generate(self, requests, sampling):
            assert all("in other words" in r.prompt[0]["content"] for r in requests)
            return [
                [
                    Completion(
                        r.prompt[0]["content"].split("<message>\n")[1].split("\n")[0].upper(), [], [], "stop"
                    )
                ]
                for r in requests
            ]

        def close(self):
            pass

    rows = chats(12)
    versions = {"own": rows, "other": paraphrased(Rewriter(), rows)}
    assert versions["other"][3].turn == "MESSAGE 3"
    assert versions["other"][3].group == "c03"  # a paraphrase stays on the side of its original
    result = reliability(engine(0.0), NINE, "paraphrase", paraphrases(versions, FREE), tmp_path, model="m")
    assert all(value.agreement.estimate == pytest.approx(1.0) for value in result.by_dimension.values())
    with pytest.raises(UserError, match="ids of all must be equal"):
        paraphrases({"own": rows, "other": rows[1:]}, FREE)


def test_chats_that_lack_a_score_are_left_out_and_counted():
    scores = np.random.default_rng(0).random((6, 9, 2))
    scores[2, 4, 1] = np.nan
    result = compare("retest", NINE, ["a", "b"], scores)
    assert result.dropped == {name: int(i == 4) for i, name in enumerate(NAMES)}
    assert result.by_dimension[NAMES[4]].subjects == 5


def test_conditions_that_cannot_differ_are_refused(tmp_path):
    with pytest.raises(UserError, match="temperature 0"):
        retests(chats(3), replace(FREE, temperature=0.0))
    with pytest.raises(UserError, match="at least two"):
        reliability(engine(0.0), NINE, "retest", retests(chats(3), FREE, 1), tmp_path, model="m")
    for options, match in (
        ({"order": NAMES[:3]}, "permutation"),
        ({"order": NAMES, "shuffle_order": True}, "choose either"),
    ):
        with pytest.raises(UserError, match=match):
            bad = [*retests(chats(3), replace(FREE, **options)), *retests(chats(3), FREE)]
            reliability(engine(0.0), NINE, "retest", bad, tmp_path, model="m")
