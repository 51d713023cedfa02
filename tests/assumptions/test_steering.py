"""Steering on tiny models: clamp, gate, scope, controls, ranges, wording; each against its definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assumptions.chats import Chat
from assumptions.coherence import Surprise, coherent, repetition, surprises, textures
from assumptions.conditions import UNEDITED, Condition, Reply, answer, dosed, reworded
from assumptions.dimensions import NAMES, SIGNS
from assumptions.directions import (
    Ground,
    composite,
    means_direction,
    orthogonalised,
    shuffled_direction,
    sycophancy_direction,
)
from assumptions.engines import HFEngine, ServedEngine
from assumptions.features import capture_features
from assumptions.gating import gated
from assumptions.organism import plant
from assumptions.probes import fit_probes
from assumptions.ranges import coherence_under, search_range
from assumptions.rewording import (
    CANDID,
    STATED,
    counterfactual,
    framed_question,
    instructed,
    rewritten_questions,
    word_controls,
)
from assumptions.splits import group_split
from assumptions.steering import Direction, clamp, probe_direction
from shared.errors import UserError
from shared.generation import Completion, Sampling
from shared.hooks import edit
from shared.interventions import load_interventions, save_interventions
from shared.models import load

WORDS = ("rent", "job", "praise", "critique", "team", "advice", "tears", "money")
ROWS = [
    Chat(f"c{i}", f"about my {WORDS[i % 8]} and {WORDS[(i * 3 + i // 8) % 8]}, {i * i}") for i in range(60)
]
SHORT = Sampling(max_tokens=6, temperature=1.0, logprobs=None)


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


@pytest.fixture(scope="module")
def study(model):
    """Features of the rows, labels that depend on block 1, the split, and probes that all read block 1."""
    features = capture_features(model, ROWS, sites=["blocks.1.output"])
    draw = torch.Generator().manual_seed(0)
    raw_B9 = features.pooled_LBD[0] @ torch.randn(features.pooled_LBD.shape[-1], 9, generator=draw)
    labels = torch.sigmoid((raw_B9 - raw_B9.mean(0)) / raw_B9.std(0)).double()
    split = group_split(ROWS)
    probes, _ = fit_probes(features, labels, NAMES, split, "made")
    return features, labels, split, probes


class TestClamp:
    def test_every_probe_reads_the_wanted_score_from_any_message(self, model, study, tmp_path):
        """Also after saving; in batches of any padding, since every token in scope is clamped."""
        probes = [
            study[3].probes[name] for name in ("user_rightness", "emotional_support", "objectivity_seeking")
        ]
        edits = [clamp(probes, [0.9, 0.1, 0.5])]
        again = load_interventions(save_interventions(tmp_path / "clamp", edits, model), model)
        for kept in (edits, again):
            with edit(model, kept):
                features = capture_features(model, ROWS[:7], sites=["blocks.1.output"], batch_size=3)
            for probe, score in zip(probes, (0.9, 0.1, 0.5)):
                torch.testing.assert_close(
                    probe.score(features), torch.full((7,), score, dtype=torch.float64), atol=1e-4, rtol=0
                )

    def test_what_cannot_be_clamped_together_is_refused(self, study):
        probe = study[3].probes["user_rightness"]
        with pytest.raises(UserError, match="one block"):
            clamp([probe, replace(probe, sites=("blocks.0.output",))], [0.5, 0.5])
        with pytest.raises(UserError, match="same direction"):
            clamp([probe, replace(probe, dimension="other")], [0.5, 0.6])


class TestScope:
    def test_prompt_and_generation_together_are_all(self, model, study):
        """The read-out moves by alpha within the scope and by nothing elsewhere."""
        direction = probe_direction(study[3].probes["user_rightness"])
        for scope, moved in (("prompt", 1.0), ("generation", 0.0), ("all", 1.0)):
            [one] = direction.interventions(2.0, "raw", scope)
            with edit(model, [one]):
                edited = capture_features(model, ROWS[:3], "prompt", sites=["blocks.1.output"])
            plain = capture_features(model, ROWS[:3], "prompt", sites=["blocks.1.output"])
            gain = (edited.pooled_LBD[0] - plain.pooled_LBD[0]).double() @ direction.unit_D
            torch.testing.assert_close(
                gain, torch.full((3,), 2.0 * moved, dtype=torch.float64), atol=1e-4, rtol=0
            )

    def test_an_edit_of_the_generation_alone_leaves_its_first_token(self, model, study):
        direction = probe_direction(study[3].probes["user_rightness"])
        plain, *edited = answer_ids(model, direction, ["generation", "all"])
        for row, (before, late, _) in enumerate(zip(plain, *edited)):
            assert before[0] == late[0], row
        assert edited[0] != plain
        assert [ids[0] for ids in edited[1]] != [ids[0] for ids in plain]


def answer_ids(model, direction, scopes):
    """Greedy token ids of the unedited model and under a huge dose in every scope."""
    requests = [Condition(UNEDITED)] + [
        Condition("x", 1.0, tuple(direction.interventions(400.0, "raw", scope))) for scope in scopes
    ]
    greedy = Sampling(max_tokens=5)
    asked = [chat_request(chat) for chat in ROWS[:6]]
    return [
        [
            one[0].token_ids
            for one in HFEngine(model).complete(condition, asked, [bool(condition.edits)] * 6, greedy)
        ]
        for condition in requests
    ]


def chat_request(chat):
    from shared.generation import Request

    return Request(chat.messages, seed=0)


class TestGate:
    def test_messages_beyond_the_threshold_are_steered_and_the_others_are_left_bit_for_bit(
        self, model, study
    ):
        features, _, _, probes = study
        probe = probes.probes["user_rightness"]
        asked, chats = features.rows(range(8)), ROWS[:8]
        threshold = float(probe.score(asked).median())
        whole = dosed([probe_direction(probe)], [300.0], "raw")[1]
        above = gated(whole, probe, asked, chats, threshold)
        below = gated(whole, probe, asked, chats, threshold, "below")
        assert above.only | below.only <= {chat.id for chat in chats}
        assert not above.only & below.only
        plain, always, some = (
            {reply.chat: reply.text for reply in answer(HFEngine(model), chats, [one], SHORT)}
            for one in (Condition(UNEDITED), whole, above)
        )
        assert all(some[name] == (always if name in above.only else plain)[name] for name in some)
        assert always != plain
        assert len({whole.digest, above.digest, below.digest}) == 3

    def test_features_of_other_chats_are_refused(self, study):
        with pytest.raises(UserError, match="other chats"):
            gated(Condition("x"), study[3].probes["user_rightness"], study[0].rows([0, 1]), ROWS[:3], 0.5)


def test_an_engine_that_serves_names_the_adapter_of_the_condition_for_gated_requests_only():
    class Recorder:
        def generate(self, requests, sampling):
            self.asked = requests
            return [[Completion("ok", [], [], "stop")] for _ in requests]

        def close(self):
            pass

    recorder = Recorder()
    direction = Direction("d.probe", "user_rightness", "probe", 1, torch.ones(4) / 2, 1.0, 1.0)
    condition = replace(dosed([direction], [2.0])[1], only=frozenset({"c1"}))
    replies = answer(ServedEngine(recorder), ROWS[:3], [Condition(UNEDITED), condition], SHORT)
    assert [request.adapter for request in recorder.asked] == [None, "d.probe@2", None]
    assert [(reply.direction, reply.dose) for reply in replies] == [("none", 0.0)] * 3 + [
        ("d.probe", 2.0)
    ] * 3


def test_dose_zero_is_the_unedited_model_bit_for_bit(model, study):
    """T24: nothing is hooked at dose 0, and an edit of strength 0 changes no bit either."""
    from shared.interventions import Add

    direction = probe_direction(study[3].probes["user_rightness"])
    assert direction.interventions(0.0) == []
    batch = model.encode([chat.messages for chat in ROWS[:4]])
    plain = model(batch)
    with edit(model, [Add(direction.site, direction.unit_D.float(), 0.0)]):
        assert torch.equal(model(batch), plain)


@pytest.fixture(scope="module")
def planted():
    """Rung A at one block: 9 latents, isotropic noise; and a ground of all rows."""
    made = plant(3000, 48, noise=0.2, seed=7)
    return made, Ground(2, made.resid_BD)


def cosine(direction, vector_D):
    return float(direction.unit_D @ vector_D / vector_D.norm())


class TestControls:
    """All controls of a direction share its block, its norm and its unit of dose."""

    def matched(self, planted):
        made, ground = planted
        return ground.direction("user_rightness.probe", "user_rightness", "probe", made.directions_KD[1])

    def test_difference_of_means_finds_the_planted_direction_and_shuffled_labels_do_not(self, planted, study):
        made, ground = planted
        matched, probe = self.matched(planted), study[3].probes["user_rightness"]
        means = means_direction(ground, matched, made.latents_BK[:, 1])
        shuffled = shuffled_direction(ground, matched, probe, made.latents_BK[:, 1])
        assert cosine(means, made.directions_KD[1]) > 0.98
        assert abs(cosine(shuffled, made.directions_KD[1])) < 0.6
        assert {one.projection_sd for one in (means, shuffled)} == {matched.projection_sd}
        assert {one.alpha(2.0) for one in (means, shuffled)} == {matched.alpha(2.0)}
        assert {one.name for one in (means, shuffled)} == {"user_rightness.means", "user_rightness.shuffled"}
        other = shuffled_direction(ground, matched, probe, made.latents_BK[:, 1], seed=1)
        assert abs(float(other.unit_D @ shuffled.unit_D)) < 0.6
        with pytest.raises(UserError, match="no two groups"):
            means_direction(ground, matched, torch.full((3000,), 0.8))

    def test_the_sycophancy_control_follows_the_judged_label(self, planted):
        """Its own target: a mixture of two latents, of which the dimension's direction holds one."""
        made, ground = planted
        judged = (made.latents_BK[:, 0] + made.latents_BK[:, 1]).numpy()
        judged[::7] = np.nan  # replies that could not be judged
        control = sycophancy_direction(ground, self.matched(planted), judged)
        mixed = made.directions_KD[0] + made.directions_KD[1]
        assert cosine(control, mixed) > 0.95
        with pytest.raises(UserError, match="judged alike"):
            sycophancy_direction(ground, self.matched(planted), np.full(3000, 3.0))

    def test_orthogonalised_directions_move_no_other_projection(self, planted):
        made, ground = planted
        mixed = made.directions_KD[:4] + 0.5 * made.directions_KD[[1, 2, 3, 0]]
        several = [ground.direction(name, name, "probe", v) for name, v in zip(NAMES, mixed)]
        for k, one in enumerate(orthogonalised(several, ground)):
            others = torch.stack([other.unit_D for i, other in enumerate(several) if i != k])
            assert float((others @ one.unit_D).abs().max()) < 1e-9
            assert float(one.unit_D @ several[k].unit_D) > 0.5
            assert one.projection_sd == pytest.approx(float((made.resid_BD @ one.unit_D).std()))
        with pytest.raises(UserError, match="span"):
            orthogonalised([several[0], replace(several[0], name="again")], ground)

    def test_the_composite_raises_s_plus_and_lowers_s_minus(self, planted):
        made, ground = planted
        several = [ground.direction(name, name, "probe", v) for name, v in zip(NAMES, made.directions_KD)]
        both = composite(several, ground)
        moved = made.directions_KD @ both.unit_D
        assert torch.equal(
            moved.sign(), torch.tensor([float(SIGNS[name]) for name in NAMES], dtype=torch.float64)
        )
        torch.testing.assert_close(moved.abs(), torch.full((9,), 1 / 3, dtype=torch.float64))
        with pytest.raises(UserError, match=r"blocks \[2, 3\]"):
            composite([several[0], replace(several[1], block=3)], ground)


class TestRange:
    @given(st.floats(1.0, 40.0), st.sampled_from([0, 2, 4]))
    def test_the_largest_coherent_dose_is_found_within_the_refinement(self, edge, refinements):
        found = search_range(lambda dose: float(dose <= edge), 1.0, 32.0, 0.9, refinements)
        assert found.largest <= edge
        if edge >= 32:
            assert (found.largest, found.limited) == (32.0, True)
        else:
            assert edge < found.largest * 2 ** (0.5**refinements) * (1 + 1e-9)
        assert found.doses(2) == pytest.approx([found.largest * x for x in (-1, -0.5, 0, 0.5, 1)])

    def test_nothing_is_tried_beyond_the_first_drop(self):
        """Coherence that returns further out is no longer about anything."""
        found = search_range(lambda dose: 0.2 if 3 < dose < 10 else 1.0, 1.0, 64.0, refinements=2)
        assert found.largest < 3
        assert max(one.dose for one in found.tried) == 4.0

    def test_where_no_dose_is_coherent_the_range_is_empty_and_says_so(self):
        found = search_range(lambda dose: 0.0, 1.0)
        assert (found.largest, len(found.tried)) == (0.0, 1)
        with pytest.raises(UserError, match="smaller one"):
            found.doses()
        with pytest.raises(UserError, match="0 < start"):
            search_range(lambda dose: 1.0, 2.0, 1.0)

    def test_on_a_model_a_tiny_dose_is_as_coherent_as_none(self, model, study):
        direction = probe_direction(study[3].probes["user_rightness"])
        sampling = Sampling(max_tokens=6, temperature=1.0, logprobs=None)
        coherence = coherence_under(HFEngine(model), model, ROWS[:4], direction, sampling)
        assert coherence(1e-6) in (0.0, 1.0)  # 0 where the unedited model never ends a reply


class TestCoherence:
    @pytest.mark.parametrize(
        ("text", "share"),
        [("a b c d e", 0.0), ("a b c a b c", 0.25), ("la la la la la", 2 / 3), ("one two", 0.0), ("", 0.0)],
    )
    def test_repetition_is_the_share_of_trigrams_seen_before(self, text, share):
        assert repetition(text) == pytest.approx(share)

    @pytest.mark.parametrize("held", [1, 3000, 2**25])
    def test_surprise_equals_a_slow_reference(self, model, monkeypatch, held):
        """Whatever the batch, its padding and how many logits are held: T2, T3 for the measure of coherence."""
        monkeypatch.setattr("assumptions.coherence.LOGITS", held)
        seen = []
        handle = model.hf.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.numel()))
        texts = ["praise the team", "rent", "", "advice, money and more advice"]
        replies = [Reply(chat.id, UNEDITED, 0.0, text, "stop") for chat, text in zip(ROWS, texts)]
        found = surprises(model, ROWS[:4], replies, batch_size=3)
        handle.remove()
        assert max(seen) <= max(held, 3 * model.architecture.vocab_size)
        assert (len(seen) > 20) is (held == 1)
        for chat, text, one in zip(ROWS, texts, found):
            prompt = model.encode([chat.messages]).rows()[0]
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            with torch.no_grad():
                logits = model.hf(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            nats = -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(ids))
            assert one.tokens == len(ids)
            assert one.nats == pytest.approx(nats, abs=1e-3)
        side = textures(replies, found)["none", 0.0]
        total = sum(one.nats for one in found) / sum(one.tokens for one in found)
        assert side.perplexity == pytest.approx(math.exp(total), rel=1e-4)
        assert side.words == pytest.approx(np.mean([len(text.split()) for text in texts]))

    def test_a_reply_is_coherent_when_it_ends_is_fresh_and_does_not_surprise(self):
        plain = [Reply(str(i), UNEDITED, 0.0, "a plain reply", "stop") for i in range(3)]
        edited = [
            Reply("0", "d", 1.0, "another plain reply", "stop"),
            Reply("1", "d", 1.0, "cut off", "length"),
            Reply("2", "d", 1.0, "no no no no no no", "stop"),
            Reply("3", "d", 1.0, "xq zz", "stop"),
            Reply("4", "d", 1.0, "", "stop"),
        ]
        surprise = [Surprise(2.0, 2)] * 3 + [Surprise(3.0, 2)] * 3 + [Surprise(9.0, 2), Surprise(0.0, 0)]
        assert coherent(plain + edited, surprise).tolist() == [True] * 4 + [False] * 4
        assert textures(plain + edited, surprise)["d", 1.0].coherent == pytest.approx(0.2)
        with pytest.raises(UserError, match="dose 0"):
            coherent(edited, surprise[3:])


class TestWording:
    chat = Chat("a", "I left early.", history=({"role": "system", "content": "Be brief."},))

    def test_an_instruction_joins_the_system_message(self):
        put = instructed()(self.chat)
        assert put.messages[0] == {"role": "system", "content": f"Be brief.\n\n{CANDID}"}
        assert [one["role"] for one in put.messages] == ["system", "user"]
        assert instructed("x")(Chat("b", "hi")).messages[0] == {"role": "system", "content": "x"}
        assert put.id == self.chat.id

    def test_a_statement_becomes_a_question(self):
        assert framed_question(self.chat).turn.startswith('Someone says: "I left early."')

        class Writer:
            def generate(self, requests, sampling):
                return [[Completion(" Was it fine to leave? ", [], [], "stop")] for _ in requests]

            def close(self):
                pass

        assert rewritten_questions(Writer(), [self.chat])(self.chat).turn == "Was it fine to leave?"

    def test_every_dimension_can_be_stated_both_ways(self):
        from shared.tinyworld import social

        assert set(STATED) == set(NAMES)
        for name in NAMES:
            turns = {counterfactual(name, high)(self.chat).turn for high in (True, False)}
            assert len(turns) == 2
            assert all(turn.startswith("I left early. ") for turn in turns)
            column = social.DIMENSIONS.index(name)
            [told] = social.sample_turns(1, seed=3)
            before = social.read_counts(told.text)[column]
            high, low = (
                counterfactual(name, up, "tinyworld")(Chat("b", told.text)).turn for up in (True, False)
            )
            assert (social.read_counts(high)[column], social.read_counts(low)[column]) == (before + 3, before)

    def test_the_conditions_reword_and_edit_nothing(self):
        conditions = word_controls("user_rightness")
        assert len({one.key for one in conditions}) == 5
        assert all(not one.edits and one.reword for one in conditions)
        assert reworded("x", framed_question).acts_on(self.chat) is False
