"""Conversations, goal switches, transcripts, mediation and the survey, on planted truths (rung B)."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assumptions.conversation import ModelUser, ScriptedUser, Turn, converse
from assumptions.corpora.item import Item
from assumptions.dimensions import NAMES, SIGNS
from assumptions.elicitation import Elicitation
from assumptions.engines import ServedEngine
from assumptions.expectations import (
    Query,
    Rating,
    export_survey,
    gaps,
    import_ratings,
    question,
    survey,
)
from assumptions.goal_users import goal_users
from assumptions.goals import analyse, carry_over, drift, drifts, half_life, series, summarise, switch
from assumptions.instruments import instrument
from assumptions.mediation import mediate
from assumptions.mixed import fit_mixed
from assumptions.parsing import Status
from assumptions.records import Record
from assumptions.spirals import BALANCE, first_to_last, slopes, spirals, turn_chats
from assumptions.splits import row_hash
from shared.data import read_rows, write_rows
from shared.errors import UserError
from shared.generation import Completion, PartFailedError


class Model:
    """Elicitor, replier and speaker in one; keeps what it was asked. `answer` writes an elicitation's answer."""

    def __init__(self, answer):
        self.answer, self.asked, self.plain = answer, [], []

    def generate(self, requests, sampling):
        self.asked += [request.prompt for request in requests]
        return [[Completion(self.answer(request.prompt), [], [], "stop")] for request in requests]

    def complete(self, condition, requests, acts, sampling):
        self.plain += [request.prompt for request in requests]
        return [[Completion(f"reply {len(request.prompt)}", [], [], "stop")] for request in requests]

    def close(self):
        pass


def scored(scores, reply=None):
    """An elicitation's answer with these scores; with a reply section where one is asked for."""
    text = json.dumps(scores)
    return f"{text}\n\nRESPONSE: {reply}" if reply else text


NINE = dict.fromkeys(NAMES, 0.5)
ASK = instrument("nine_scores")


class TestConversation:
    def test_turns_are_counted_from_one_and_a_script_ends_the_conversation(self):
        """T20: one turn model. Conversations of different length go side by side and end by themselves."""
        model = Model(lambda prompt: scored(NINE))
        users = {"b": ScriptedUser(["one", "two", "three"]), "a": ScriptedUser(["hello"])}
        turns = converse(users, ASK, model, model)
        assert [(one.turn, one.conversation, one.user) for one in turns] == [
            (1, "a", "hello"), (1, "b", "one"), (2, "b", "two"), (3, "b", "three")
        ]  # fmt: skip
        assert all(one.scores == NINE and one.status == "clean" for one in turns)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=20, deadline=None)
    def test_no_turn_is_skipped_or_doubled(self, lengths):
        """T20, as a property over conversations of any lengths."""
        model = Model(lambda prompt: scored(NINE))
        users = {f"c{i}": ScriptedUser([f"m{t}" for t in range(1, n + 1)]) for i, n in enumerate(lengths)}
        turns = converse(users, ASK, model, model)
        for i, n in enumerate(lengths):
            mine = [(one.turn, one.user) for one in turns if one.conversation == f"c{i}"]
            assert mine == [(t, f"m{t}") for t in range(1, n + 1)]
        with pytest.raises(UserError, match="message 2"):
            ScriptedUser(["one", " ", "three"])

    def test_reply_only_keeps_the_json_out_of_the_history_and_full_keeps_it(self):
        """T17."""
        asked = instrument("4dims")
        beliefs = {n: {"score": 0.7, "explanation": "so"} for n in asked.dimensions}
        answer = scored({"mental_model": {"beliefs": beliefs}}, "I hear you.")
        for history, braces in (("reply_only", False), ("full", True)):
            model = Model(lambda prompt: answer)
            turns = converse({"a": ScriptedUser(["one", "two"])}, asked, model, model, history=history)
            later = model.asked[1][-1]["content"]
            assert "I hear you." in later
            assert ('"score": 0.7' in later) is braces
            assert {one.history for one in turns} == {history}
            assert [one.reply for one in turns] == ["I hear you."] * 2
        assert model.plain == []  # the instrument's own reply is the reply

    def test_a_failed_elicitation_has_no_scores_and_leaves_no_trace_in_the_history(self):
        """T16: an error never enters the next turn."""
        model = Model(lambda prompt: "Error: out of memory")
        turns = converse({"a": ScriptedUser(["one", "two"])}, ASK, model, model)
        assert [one.status for one in turns] == ["failed", "failed"]
        assert all(one.scores == {} for one in turns)
        assert all("out of memory" not in str(prompt) for prompt in (*model.asked, *model.plain))
        assert [m["content"] for m in model.plain[1]] == ["one", "reply 1", "two"]
        turns = converse({"a": ScriptedUser(["one", "two"])}, ASK, model, model, history="full")
        assert [(one.turn, one.status) for one in turns] == [(1, "failed")]  # it would be read again

    def test_without_a_reply_the_conversation_ends(self):
        asked = instrument("4dims")
        model = Model(lambda prompt: "nothing to read")
        turns = converse({"a": ScriptedUser(["one", "two"])}, asked, model, model)
        assert [(one.turn, one.reply) for one in turns] == [(1, "")]

    def test_a_row_that_the_engine_refuses_ends_its_conversation_and_no_other(self):
        """A server's filter refuses the same words for ever: a study of many conversations must get past them."""

        class Filtering(Model):
            def answers(self, found):
                told = [
                    UserError("refused") if "bad" in str(prompt) else one
                    for prompt, one in zip(self.asked[-len(found) :], found, strict=True)
                ]
                if any(isinstance(one, UserError) for one in told):
                    raise PartFailedError(told)
                return found

            def generate(self, requests, sampling):
                return self.answers(super().generate(requests, sampling))

        model = Filtering(lambda prompt: scored(NINE))
        users = {"a": ScriptedUser(["one", "bad", "three"]), "b": ScriptedUser(["one", "two", "three"])}
        turns = converse(users, ASK, model, ServedEngine(model))
        assert [(one.conversation, one.turn, one.status) for one in turns] == [
            ("a", 1, "clean"), ("b", 1, "clean"), ("a", 2, "failed"), ("b", 2, "clean"), ("b", 3, "clean")
        ]  # fmt: skip
        with pytest.raises(
            UserError, match="refused"
        ):  # of an engine that refuses everything nothing is learnt
            converse(
                {"a": ScriptedUser(["bad"]), "b": ScriptedUser(["bad"])}, ASK, model, ServedEngine(model)
            )

    def test_a_model_plays_the_person_and_changes_its_goal(self):
        user = ModelUser("opening", "You are kind.", "Goal one.", 4, "Goal two.", switch_after=2)
        speaker = Model(lambda prompt: f"said at {prompt[0]['content'].count('You: ') + 1}")
        model = Model(lambda prompt: scored(NINE))
        turns = converse({"a": user}, ASK, model, model, speaker=speaker, turns=10)
        assert [one.user for one in turns] == ["opening", "said at 2", "said at 3", "said at 4"]
        goals = ["Goal one." in prompt[0]["content"] for prompt in speaker.asked]
        assert goals == [True, False, False]
        with pytest.raises(UserError, match="speaker"):
            converse({"a": user}, ASK, model, model)

    def test_seeds_of_both_modes(self):
        from assumptions.corpora import load_corpus

        items = load_corpus("goal_switch").items
        modes = goal_users(items, turns=4, switch_after=2)
        assert set(modes) == {"validation", "objectivity"}
        assert set(modes["validation"]) == set(modes["objectivity"])
        one, other = (modes[mode][next(iter(modes[mode]))] for mode in modes)
        assert one.goal == other.later_goal
        assert one.opening != other.opening
        with pytest.raises(UserError, match="goal_switch"):
            goal_users([Item("x", ({"role": "user", "content": "hi"},))])


class TestSwitch:
    def planted(self, rate, pre=0.9, target=0.2, after=5, turns=12):
        """Score that stays at pre, then decays to the target by a factor a turn: the planted carry-over."""
        later = [target + (pre - target) * rate**n for n in range(1, turns - after + 1)]
        return np.array([pre] * after + later)

    @pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.95])
    def test_a_planted_carry_over_is_found(self, rate):
        found = switch(self.planted(rate), after=5, target=0.2)
        assert found.pre == pytest.approx(0.9)
        assert found.jump == pytest.approx(0.7 * (rate - 1))
        assert found.residual == pytest.approx([0.7 * rate**n for n in range(1, 8)])
        assert found.stickiness == pytest.approx(rate**7)
        assert found.carry_over == pytest.approx(rate)
        life = math.log(0.5) / math.log(rate)
        assert found.half_life == (pytest.approx(life) if life <= 7 else math.inf)

    def test_conversations_that_begin_near_the_target_do_not_rule_stickiness(self):
        """Three tenths of the distance are left; the mean of the ratios would be 0.9 for one conversation's sake."""
        pre = [0.8, 0.8, 0.8, 0.26]
        scores = {str(i): np.array([one, 0.2 + 0.3 * np.mean(pre) - 0.06]) for i, one in enumerate(pre)}
        found = summarise(scores, after=1, target=0.2)
        assert found.stickiness.estimate == pytest.approx(0.3)
        assert np.mean([switch(one, 1, 0.2).stickiness for one in scores.values()]) > 0.6
        assert math.isnan(summarise(scores, after=1, target=float(np.mean(pre))).stickiness.estimate)

    def test_one_conversation_has_no_interval(self):
        """Resampling one says that nothing varies: an interval of no width would claim certainty."""
        found = summarise({"a": self.planted(0.5)}, after=5, target=0.2)
        assert found.stickiness.estimate == pytest.approx(0.5**7)
        for one in (found.pre, found.stickiness, drifts({"a": self.planted(0.5)})):
            assert np.isnan([one.low, one.high]).all()

    def test_limits(self):
        assert switch(self.planted(1.0), 5, 0.2).stickiness == pytest.approx(1.0)
        assert switch(self.planted(0.0), 5, 0.2).stickiness == pytest.approx(0.0)
        assert switch(self.planted(0.0), 5, 0.2).half_life == pytest.approx(0.5)
        near = switch(self.planted(0.5, pre=0.22), 5, 0.2)
        assert math.isnan(near.stickiness)  # a share of next to nothing
        assert near.residual[0] == pytest.approx(0.01)
        with pytest.raises(UserError, match="later turn"):
            switch(np.full(5, 0.5), 5, 0.2)
        gap = self.planted(0.5)
        gap[6] = np.nan
        assert math.isfinite(switch(gap, 5, 0.2).stickiness)
        assert math.isnan(half_life(np.array([np.nan, 0.1]), 0.7))
        assert math.isnan(carry_over(np.array([np.nan, np.nan])))

    def test_summaries_are_over_conversations(self):
        scores = {f"c{i}": self.planted(0.5, pre=0.8 + 0.02 * i) for i in range(6)}
        found = summarise(scores, after=5, target=0.2)
        assert found.conversations == 6
        assert found.pre.estimate == pytest.approx(0.85)
        assert found.stickiness.estimate == pytest.approx(0.5**7)
        assert found.by_turn[:5] == pytest.approx([0.85] * 5)
        assert found.half_life_median == pytest.approx(1.0)

    def test_a_conversation_that_ended_before_its_switch_has_none(self):
        def turns(name, length):
            return [Turn(name, t, "u", "r", {"user_rightness": 0.5}, "clean") for t in range(1, length + 1)]

        modes = {"validation": turns("a", 4), "objectivity_to_validation": turns("a", 4) + turns("b", 2)}
        found = analyse(modes, ["user_rightness"], 2)
        assert found.switches["objectivity_to_validation"]["user_rightness"].conversations == 1
        modes["objectivity_to_validation"] = turns("b", 2)
        assert analyse(modes, ["user_rightness"], 2).switches == {}

    def test_drift_without_a_switch(self):
        rising = {f"c{i}": 0.3 + 0.02 * i * np.arange(1, 11) for i in (1, 2, 3)}
        assert drift(rising["c2"]) == pytest.approx(0.04)
        assert drifts(rising).estimate == pytest.approx(0.04)
        assert math.isnan(drift(np.array([0.3, np.nan])))

    def test_series_keeps_the_place_of_a_turn_that_failed(self):
        turns = [
            Turn("a", t, "u", "r", {} if t == 2 else {"user_rightness": t / 10}, "clean") for t in (1, 2, 3)
        ]
        np.testing.assert_array_equal(series(turns, "user_rightness")["a"], [0.1, np.nan, 0.3])


class TestTranscripts:
    def transcripts(self):
        said = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
        return [Item("long", tuple(said)), Item("short", tuple(said[:3]), group="g")]

    def test_every_user_message_is_asked_about_with_what_came_before(self):
        chats = turn_chats(self.transcripts())
        assert [chat.id for chat in chats] == ["long#1", "long#2", "long#3", "short#1", "short#2"]
        assert [len(chat.history) for chat in chats] == [0, 2, 4, 0, 2]
        assert [chat.group for chat in chats] == ["long"] * 3 + ["g"] * 2
        with pytest.raises(UserError, match="turn 1"):
            turn_chats([Item("x", ({"role": "user", "content": " "},))])
        with pytest.raises(UserError, match="unique"):
            turn_chats([*self.transcripts(), self.transcripts()[0]])

    def test_a_planted_rise_is_found_by_conversation(self):
        chats = turn_chats(self.transcripts())

        def record(chat):
            turn = int(chat.id.rpartition("#")[2])
            scores = {name: 0.5 + 0.1 * SIGNS[name] * turn for name in NAMES}
            return Record(chat.id, 0, Status.CLEAN, scores, "", row_hash(chat))

        found = spirals(Elicitation([record(chat) for chat in chats]), chats, NAMES)
        assert [one.conversation for one in found] == ["long", "short"]
        assert [len(one.scores[BALANCE]) for one in found] == [3, 2]
        assert found[0].slopes[BALANCE] == pytest.approx(0.2)
        assert found[0].slopes["objectivity_seeking"] == pytest.approx(-0.1)
        assert slopes(found)["user_rightness"].estimate == pytest.approx(0.1)
        assert first_to_last(found) == pytest.approx({"long": 0.4, "short": 0.2})


class TestMediation:
    def rows(self, a=0.5, b=2.0, direct=0.3, messages=40, noise=0.0):
        draw = np.random.default_rng(1)
        names, dose, assumption, outcome = [], [], [], []
        for i in range(messages):
            base_m, base_y = draw.normal(size=2) * 3  # between messages everything differs
            for x in (-1.0, 0.0, 1.0):
                m = base_m + a * x + draw.normal() * 0.2
                names.append(f"c{i}")
                dose.append(x)
                assumption.append(m)
                outcome.append(base_y + direct * x + b * (m - base_m) + noise * draw.normal())
        return names, np.array(dose), np.array(assumption), np.array(outcome)

    def test_the_planted_paths_are_found_although_messages_differ(self):
        found = mediate(*self.rows(noise=0.1), resamples=300)
        assert found.a.estimate == pytest.approx(0.5, abs=0.05)
        assert found.b.estimate == pytest.approx(2.0, abs=0.1)
        assert found.indirect.low < 1.0 < found.indirect.high
        assert found.direct.estimate == pytest.approx(0.3, abs=0.1)
        assert found.share.estimate == pytest.approx(1.0 / 1.3, abs=0.08)

    def test_direct_and_indirect_add_up_and_equal_regressions(self):
        """Also where messages lack doses: an indicator for every message and every dose."""
        names, x, m, y = self.rows(noise=0.5)
        y += 0.7 * x**2  # what the dose does need not be linear
        kept = np.random.default_rng(3).permutation(len(x))[:100]
        names, (x, m, y) = [names[i] for i in kept], (x[kept], m[kept], y[kept])
        found = mediate(names, x, m, y, resamples=20)
        seen = [
            name for name in dict.fromkeys(names) if len({x[i] for i, n in enumerate(names) if n == name}) > 1
        ]
        rows = [i for i, name in enumerate(names) if name in seen]
        names, x, m, y = [names[i] for i in rows], x[rows], m[rows], y[rows]
        own = np.equal.outer(names, seen).astype(float)
        levels = np.equal.outer(x, [-1.0, 0.0, 1.0]).astype(float)

        def regressed(target, *columns):
            return np.linalg.lstsq(np.column_stack(columns), target, rcond=None)[0][0]

        assert found.messages == len(seen)
        assert found.a.estimate == pytest.approx(regressed(m, x, own))
        assert found.total.estimate == pytest.approx(regressed(y, x, own))
        assert found.b.estimate == pytest.approx(regressed(y, m, own, levels))
        assert found.total.estimate == pytest.approx(found.direct.estimate + found.indirect.estimate)
        assert found.direct.estimate == pytest.approx(regressed(y - found.b.estimate * m, x, own))

    def test_without_an_effect_on_the_assumption_nothing_is_mediated(self):
        found = mediate(*self.rows(a=0.0, noise=0.1), resamples=300)
        assert found.indirect.low < 0 < found.indirect.high
        with pytest.raises(UserError, match="two messages"):
            mediate(["a", "b"], np.zeros(2), np.zeros(2), np.zeros(2))
        flat = mediate(
            ["a", "a", "b", "b"],
            np.array([0.0, 1, 0, 1]),
            np.array([0.0, 1, 0, 2]),
            np.zeros(4),
            resamples=20,
        )
        assert np.isnan([flat.share.estimate, flat.share.low]).all()  # there is no effect to share
        names, x, m, y = self.rows()
        m[0] = np.nan
        assert mediate(names, x, m, y, resamples=20).messages == 40


class TestMixed:
    def data(self, effect=0.2, participants=30, queries=8, seed=0):
        """Balanced: every participant rates every query under both addressees."""
        draw = np.random.default_rng(seed)
        who, what = draw.normal(0, 0.3, participants), draw.normal(0, 0.5, queries)
        rows = [(p, q, x) for p in range(participants) for q in range(queries) for x in (0.0, 1.0)]
        y = np.array([0.5 + effect * x + who[p] + what[q] + draw.normal(0, 0.2) for p, q, x in rows])
        return (
            y,
            np.array([x for *_, x in rows]),
            [[f"p{p}" for p, *_ in rows], [f"q{q}" for _, q, _ in rows]],
        )

    def test_a_balanced_design_gives_the_analysis_of_variance(self):
        """REML of crossed intercepts: the mean squares' closed form for variances, slope and its standard error."""
        y, x, groups = self.data()
        cube = y.reshape(30, 8, 2)
        found = fit_mixed(y, x, groups)
        assert found.slope.estimate == pytest.approx((cube[..., 1] - cube[..., 0]).mean(), abs=1e-6)
        centred = cube - cube.mean((0, 1))
        people, queries = centred.mean((1, 2)), centred.mean((0, 2))
        rest = centred - people[:, None, None] - queries[None, :, None] + centred.mean()
        free = y.size - 2 - 29 - 7
        mse = (rest**2).sum() / free
        people_sd = math.sqrt((16 * people.var(ddof=1) - mse) / 16)
        queries_sd = math.sqrt((60 * queries.var(ddof=1) - mse) / 60)
        assert found.residual_sd == pytest.approx(math.sqrt(mse), rel=1e-3)
        assert found.group_sd == pytest.approx((people_sd, queries_sd), rel=1e-2)
        assert found.standard_error == pytest.approx(math.sqrt(mse * 4 / y.size), rel=1e-3)

    def test_intervals_cover_the_planted_effect(self):
        held = 0
        for seed in range(40):
            fit = fit_mixed(*self.data(seed=seed, participants=10, queries=6))
            held += fit.slope.low <= 0.2 <= fit.slope.high
        assert held >= 34

    def test_what_cannot_be_fitted_is_refused(self):
        y, x, groups = self.data(participants=3, queries=2)
        for bad in ((y, np.ones_like(x), groups), (y, x, [["p"] * len(y), groups[1]])):
            with pytest.raises(UserError, match="two values"):
                fit_mixed(*bad)


class TestSurvey:
    queries = tuple(Query(f"q{i}", f"message {i}") for i in range(6))

    def test_the_addressee_is_the_only_difference(self):
        ai, human = (question(self.queries[0], who, "objectivity_seeking") for who in ("ai", "human"))
        assert ai.replace("an AI assistant", "another person whom they trust") == human
        assert "impartial assessment" in ai

    def test_it_is_counterbalanced(self):
        asked = survey(self.queries, 4, ["user_rightness", "emotional_support"], seed=3)
        assert len(asked) == 4 * 6 * 2
        for query in self.queries:
            who = [(one.participant, one.addressee) for one in asked if one.query == query.id]
            assert len({p for p, _ in who}) == len({(p, a) for p, a in who}) == 4  # never under both
            assert sorted(a for _, a in set(who)) == ["ai", "ai", "human", "human"]
        orders = {
            tuple(dict.fromkeys(o.query for o in asked if o.participant == p)) for p in ("p0000", "p0001")
        }
        assert len(orders) == 2
        assert survey(self.queries, 4, seed=3) == survey(self.queries, 4, seed=3)
        for bad, match in ((3, "even"), (0, "even")):
            with pytest.raises(UserError, match=match):
                survey(self.queries, bad)

    def test_a_planted_shift_of_the_addressee_is_found(self, tmp_path):
        """Rung B: people expect more objectivity from an assistant; the model assumes human norms."""
        draw = np.random.default_rng(0)
        asked = survey(self.queries, 24, ["objectivity_seeking", "emotional_support"])
        shift = {"objectivity_seeking": 20.0, "emotional_support": 0.0}
        who = {f"p{i:04}": draw.normal(0, 8) for i in range(24)}
        ratings = []
        for one in asked:
            mean = 40 + shift[one.dimension] * (one.addressee == "ai") + who[one.participant]
            drawn = float(np.clip(mean + draw.normal(0, 5), 0, 100))
            ratings.append(Rating(one.participant, one.query, one.addressee, one.dimension, drawn))
        export_survey(tmp_path / "survey.jsonl", asked)
        assert len(read_rows(tmp_path / "survey.jsonl", type(asked[0]))) == len(asked)
        write_rows(tmp_path / "ratings.jsonl", ratings)
        read = import_ratings(tmp_path / "ratings.jsonl", asked)
        assert read == ratings
        scores = {query.id: {"objectivity_seeking": 0.4} for query in self.queries}
        found = {one.dimension: one for one in gaps(read, scores)}
        objective, warm = found["objectivity_seeking"], found["emotional_support"]
        assert objective.addressee.slope.estimate == pytest.approx(0.2, abs=0.02)
        assert warm.addressee.slope.low < 0 < warm.addressee.slope.high
        assert objective.model_less_people.estimate == pytest.approx(-0.2, abs=0.04)
        assert warm.model_less_people is None

    def test_ratings_that_were_not_asked_are_refused(self, tmp_path):
        asked = survey(self.queries, 2, ["user_rightness"])
        first = asked[0]
        good = Rating(first.participant, first.query, first.addressee, first.dimension, 50.0)
        other = "human" if first.addressee == "ai" else "ai"
        wrong = Rating(first.participant, first.query, other, first.dimension, 50.0)
        for rows, match in (([wrong], "not asked"), ([good, good], "twice")):
            write_rows(tmp_path / "ratings.jsonl", rows)
            with pytest.raises(UserError, match=match):
                import_ratings(tmp_path / "ratings.jsonl", asked)
        with pytest.raises(UserError, match="0 to 100"):
            Rating("p", "q", "ai", "user_rightness", 101.0)
