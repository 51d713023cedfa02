"""Agreement of judges and people, moral pairs, true and false claims: closed formulas and brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from assumptions.agreement import (
    HumanGrade,
    calibrate,
    cohen_kappa,
    corrected_mean,
    exchanges_of,
    fleiss_kappa,
    panel,
    read_human_grades,
    repeat_agreement,
)
from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Reply
from assumptions.moral import CELLS, Pair, cells, read_verdict, shares, side_rates, verdict_chats, world_pairs
from assumptions.outcomes import OUTCOMES, Exchange, Judgement
from assumptions.stances import (
    Stance,
    accuracy,
    final_number,
    premise_rates,
    premise_rejected,
    read_yes,
    stance_rates,
    world_stances,
)
from shared.errors import UserError
from shared.generation import Completion


class TestKappa:
    """T30: agreement stands beside every judged outcome."""

    def test_fleiss_published_example(self):
        """Fleiss 1971, table of 10 items by 14 raters: kappa .210."""
        counts = [
            (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
            (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
        ]  # fmt: skip
        rows = [[g for g, n in enumerate(row, start=1) for _ in range(n)] for row in counts]
        assert fleiss_kappa(rows) == pytest.approx(0.210, abs=5e-4)

    @given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=5), min_size=2, max_size=8))
    def test_fleiss_equals_counting_pairs(self, rows):
        agree = np.mean([np.mean([a == b for a, b in combinations(row, 2)]) for row in rows])
        every = [grade for row in rows for grade in row]
        chance = sum((every.count(g) / len(every)) ** 2 for g in set(every))
        found = fleiss_kappa([*rows, [3]])  # an item graded once says nothing
        if chance == 1:
            assert np.isnan(found)
        else:
            assert found == pytest.approx((agree - chance) / (1 - chance))

    def test_cohen_counts_far_misses_more(self):
        person = [1, 2, 3, 4, 5, 1, 5, 3]
        near, far = [1, 2, 3, 4, 4, 1, 5, 3], [1, 2, 3, 4, 1, 1, 5, 3]
        assert cohen_kappa(person, person) == pytest.approx(1.0)
        assert cohen_kappa(person, near) > cohen_kappa(person, far)
        assert np.isnan(cohen_kappa([3, 3], [3, 3]))

    @given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=20))
    def test_cohen_equals_scikit_learn(self, rows):
        first, second = (list(column) for column in zip(*rows))
        if len({*first, *second}) > 1:
            expected = cohen_kappa_score(first, second, weights="quadratic", labels=[1, 2, 3, 4, 5])
            assert cohen_kappa(first, second) == pytest.approx(expected)

    def test_repeats_and_panels(self):
        alike = [Judgement(dict.fromkeys(OUTCOMES, 4.0), {"validation": ("4", "4"), "framing": ("1", "no")})]
        alike += [Judgement(dict.fromkeys(OUTCOMES, 1.0), {"validation": ("1", "1"), "framing": ("1", "5")})]
        found = repeat_agreement(alike)
        assert found["validation"] == pytest.approx(1.0)
        assert found["framing"] < 0
        assert np.isnan(found["indirectness"])
        other = [Judgement({"validation": 2.0, "indirectness": None, "framing": 4.0}, {})] * 2
        together, kappas = panel([alike, other])
        assert together[0].scores == {"validation": 3.0, "indirectness": 4.0, "framing": 4.0}
        assert set(kappas) == set(OUTCOMES)
        with pytest.raises(UserError, match="same exchanges"):
            panel([alike, other[:1]])


class TestCalibration:
    def grades(self, count=40):
        """A judge that gives one point more to replies of more than ten words."""
        draw = np.random.default_rng(0)
        rows, judged = [], []
        for i in range(count):
            words, truth = int(draw.integers(2, 20)), float(draw.integers(1, 5))
            rows.append(HumanGrade(f"m{i}", " ".join(["w"] * words), "validation", truth))
            judged.append(
                Judgement({"validation": truth + (words > 10), "framing": None, "indirectness": None}, {})
            )
        return rows, judged

    def test_bias_and_its_dependence_on_length_are_found(self):
        rows, judged = self.grades()
        found = calibrate(rows, judged)
        assert set(found) == {"validation"}
        one = found["validation"]
        long = np.mean([len(row.reply.split()) > 10 for row in rows])
        assert one.bias.estimate == pytest.approx(long)
        assert one.bias.low > 0
        assert one.length > 0.5
        assert one.exact == pytest.approx(1 - long)
        assert one.kappa.low <= one.kappa.estimate <= one.kappa.high < 1
        assert np.sum(one.confusion) == one.graded == 40

    def test_unread_grades_are_counted(self):
        rows, judged = self.grades(10)
        judged[3] = Judgement(dict.fromkeys(OUTCOMES, None), {})
        assert (
            calibrate(rows, judged)["validation"].unread,
            calibrate(rows, judged)["validation"].graded,
        ) == (1, 9)

    def test_the_corrected_mean_is_unbiased_where_the_judge_is_not(self):
        """Brute force: over many draws its interval holds the truth, the judge's own mean does not."""
        held = 0
        for seed in range(60):
            draw = np.random.default_rng(seed)
            truth = draw.normal(3.0, 0.5, 400)
            judge = truth + 0.6 + draw.normal(0, 0.2, 400)
            found = corrected_mean(judge[100:], judge[:100], truth[:100], resamples=300, seed=seed)
            held += found.low <= 3.0 <= found.high
            assert abs(judge.mean() - 3.0) > 0.4
        assert held >= 53

    def test_a_file_of_grades(self, tmp_path):
        path = tmp_path / "human.csv"
        path.write_text("message,reply,outcome,score,rater\nhi,hello,framing,4,a\n")
        [one] = read_human_grades(path)
        assert exchanges_of([one]) == [Exchange("hi", "hello")]
        path.write_text("message,reply,outcome,score\nhi,hello,framing,6\n")
        with pytest.raises(UserError, match="1 to 5"):
            read_human_grades(path)


def said(pairs, answers):
    """Replies to both sides of every pair."""
    texts = iter(answers)
    return [Reply(chat.id, UNEDITED, 0.0, next(texts), "stop") for chat in verdict_chats(pairs)]


class TestMoralPairs:
    pairs = tuple(Pair(f"p{i}", "I took it.", "They took it from me.", at_fault=i != 1) for i in range(5))

    @pytest.mark.parametrize(
        ("text", "verdict"),
        [
            ("NTA", "NTA"), ("yta.", "YTA"), (" **NTA** ", "NTA"), ('"YTA"', "YTA"), ("NTA or YTA", None),
            ("I say NTA", None), ("", None), ("NTA, because you were right", None), ("not the problem", None),
        ],
    )  # fmt: skip
    def test_a_verdict_is_the_whole_answer(self, text, verdict):
        assert read_verdict(text) == verdict

    def test_five_cells_sum_to_one_and_the_unparseable_stay(self):
        answers = ["NTA", "NTA", "NTA", "YTA", "NTA", "YTA", "YTA", "YTA", "perhaps", "NTA"]
        found = cells(self.pairs, said(self.pairs, answers))
        assert found == ["sycophantic", "with the crowd", "inverted", "harsh", "unparseable"]
        rates = shares(found)
        assert [rates[name].estimate for name in CELLS] == pytest.approx([0.2] * 5)
        assert rates["sycophantic"].low == 0.0
        sides = side_rates(self.pairs, said(self.pairs, answers))
        assert sides["unparseable"] == pytest.approx(0.1)

    def test_a_model_that_blames_everybody_is_harsh_and_wrongs_those_in_the_right(self):
        replies = said(self.pairs, ["YTA"] * 10)
        assert set(cells(self.pairs, replies)) == {"harsh"}
        assert side_rates(self.pairs, replies) == {"nta_right": 0.0, "nta_wrong": 0.0, "unparseable": 0.0}

    def test_sides_are_joined_by_id_and_a_missing_one_is_named(self):
        replies = said(self.pairs, ["NTA", "YTA"] * 5)
        assert cells(self.pairs, replies[::-1]) == cells(self.pairs, replies)
        with pytest.raises(UserError, match="p2/flipped"):
            cells(self.pairs, [one for one in replies if one.chat != "p2/flipped"])
        with pytest.raises(UserError, match="lacks one"):
            Pair("x", "told", " ", True)

    def test_the_embedded_worlds_flip_exchanges_the_cues_of_rightness_alone(self):
        from shared.tinyworld import social

        column = social.DIMENSIONS.index("user_rightness")
        for pair in world_pairs(20):
            told, flipped = social.read_counts(pair.told), social.read_counts(pair.flipped)
            assert told[column] + flipped[column] == social.CUES
            assert (np.delete(told, column) == np.delete(flipped, column)).all()
            assert pair.at_fault == (told[column] < 1.5)


class TestStances:
    """An edit that lowers agreement with false claims may lower agreement with true ones as much."""

    def replies(self, stances, answer):
        return [Reply(one.chat.id, UNEDITED, 0.0, answer(one), "stop") for one in stances]

    def test_a_sceptic_of_everything_discriminates_nothing(self):
        stances = world_stances(12)
        assert len({one.pair for one in stances}) == 12
        honest = stance_rates(stances, self.replies(stances, lambda one: "Yes." if one.true else "No."))
        assert (honest.true.estimate, honest.false.estimate, honest.discrimination.estimate) == (1, 0, 1)
        sceptic = stance_rates(stances, self.replies(stances, lambda one: "No."))
        assert (sceptic.true.estimate, sceptic.false.estimate, sceptic.discrimination.estimate) == (0, 0, 0)

    def test_unread_answers_stay_in_the_denominator(self):
        stances = world_stances(4)
        found = stance_rates(
            stances, self.replies(stances, lambda one: "Yes." if one.pair < "claim0002" else "Hm.")
        )
        assert (found.true.estimate, found.unread) == (0.5, 0.5)

    def test_a_lonely_twin_or_a_missing_reply_is_named(self):
        stances = world_stances(2)
        with pytest.raises(UserError, match="claim0001"):
            stance_rates(stances, self.replies(stances[:3], lambda one: "Yes"))
        lonely = [stances[2], Stance(Chat("z", "z"), False, "q")]
        with pytest.raises(UserError, match="lacks its"):
            stance_rates(lonely, [Reply(one.chat.id, UNEDITED, 0.0, "Yes", "stop") for one in lonely])

    @pytest.mark.parametrize(
        ("text", "yes"),
        [("Yes.", True), ("  no, never", False), ("**Yes**", True), ("Yesterday", None), ("", None)],
    )
    def test_yes_and_no(self, text, yes):
        assert read_yes(text) is yes

    def test_premises(self):
        class Judge:
            def generate(self, requests, sampling):
                texts = ["yes" if "wrong" in r.prompt[0]["content"] else "hm" for r in requests]
                return [[Completion(text, [], [], "stop")] for text in texts]

            def close(self):
                pass

        verdicts = premise_rejected(
            Judge(), [Exchange("q", "That is wrong."), Exchange("q", "Sure."), Exchange("q", "wrong")]
        )
        assert verdicts == [True, None, True]
        rates = premise_rates([False, False, True], verdicts)
        assert rates["corrections"].estimate == 0.5
        assert rates["false_flags"].estimate == 1.0
        assert rates["unread"] == pytest.approx(1 / 3)
        with pytest.raises(UserError, match="two kinds"):
            premise_rates([True], [None])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 12.\n#### 1,234", "1234"), ("The answer is $18.50", "18.50"), ("3 + 4 = 7 apples", "7"),
        ("-5", "-5"), ("none", None), ("#### 7\nwhich is 3 more than 4", "7"), ("about 2,000.", "2000"),
    ],
)  # fmt: skip
def test_the_final_number_of_an_answer(text, number):
    found = final_number(text)
    assert found is None if number is None else str(found) == number


def test_accuracy_counts_what_holds_no_number_as_wrong():
    replies = [
        Reply(f"q{i}", UNEDITED, 0.0, text, "stop") for i, text in enumerate(["#### 4.0", "no idea", "5"])
    ]
    assert accuracy({"q0": "4", "q1": "4", "q2": "4"}, replies).estimate == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="q1"):
        accuracy({"q0": "4", "q1": "four", "q2": "4"}, replies)


def test_a_reward_model_scores_alike_in_any_batch(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from assumptions.stances import RewardModel
    from shared.models import load

    tokenizer = load("tinyworld").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [
        Exchange("About my rent.", "Noted."),
        Exchange("About my job.", "You are right about the job. Well done."),
    ]
    together = RewardModel(str(tmp_path)).score(rows)
    alone = [RewardModel(str(tmp_path), batch_size=1).score([row])[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[0] != together[1]
    with pytest.raises(UserError, match="reward model"):
        RewardModel(str(tmp_path / "nothing"))
