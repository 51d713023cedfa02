"""Messages, posteriors, instrument, replies: each part of the organism against its definition."""

import json

import jsonschema
import numpy as np
import pytest
from scipy import stats

from shared.tinyworld import social


@pytest.fixture(scope="module")
def turns():
    return social.sample_turns(2000, seed=5)


def test_reading_a_message_inverts_writing_it(turns):
    assert all((social.read_counts(t.text) == t.counts_9).all() for t in turns)


def test_cue_words_serve_once():
    words = [w for sides in social.CUE_WORDS.values() for side in sides for w in side]
    assert len(words) == len(set(words)) == 54


def test_counts_follow_the_latents_and_the_posterior_mean_is_calibrated(turns):
    latents, counts = np.stack([t.latents_9 for t in turns]), np.stack([t.counts_9 for t in turns])
    assert abs((counts / social.CUES - latents).mean()) < 0.01
    for k in range(social.CUES + 1):
        mean = latents[counts == k].mean()
        assert mean == pytest.approx((k + 1) / (social.CUES + 2), abs=0.02)
    posterior = np.stack([t.posterior_9 for t in turns])
    r2 = 1 - ((latents - posterior) ** 2).mean() / latents.var()
    assert r2 == pytest.approx(social.CUES / (social.CUES + 2), abs=0.02)  # the ceiling n / (n + 2)


def test_negations_are_as_frequent_as_stated(turns):
    share = np.mean([t.text.count("not ") for t in turns]) / 27
    assert share == pytest.approx(social.NEGATED_SHARE, abs=0.01)


def test_splits_and_seeds_differ():
    train, test = social.sample_turns(200, 0, "train"), social.sample_turns(200, 0, "test")
    assert not {t.text for t in train} & {t.text for t in test}
    assert [t.text for t in test] == [t.text for t in social.sample_turns(200, 0, "test")]
    with pytest.raises(ValueError, match="train or test"):
        social.sample_turns(1, 0, "valid")


@pytest.mark.parametrize("delta", [0.0, 0.4, -0.7])
def test_score_distribution_is_the_binned_shifted_beta(delta):
    counts = np.array([0, 1, 2, 3, 0, 1, 2, 3, 2])
    table = social.score_probabilities(counts, np.full(9, delta))
    assert table.sum(-1) == pytest.approx(1)
    rng = np.random.default_rng(0)
    for k, row in zip(counts, table, strict=True):
        draws = np.clip(
            stats.beta.rvs(k + 1, social.CUES - k + 1, size=40_000, random_state=rng) + delta, 0, 1
        )
        share = np.bincount(np.rint(draws / 0.05).astype(int), minlength=21) / len(draws)
        assert np.abs(share - row).max() < 0.01


def test_expected_reply_matches_monte_carlo():
    counts = np.array([[3, 0, 2, 1, 3, 2, 0, 1, 2], [0, 3, 1, 2, 0, 1, 3, 2, 1]])
    delta = np.array([0.5, 0, 0, -0.5, 0, 0, 0, 0, 0])
    rng = np.random.default_rng(1)
    for shift in (np.zeros(9), delta):
        draws = np.clip(rng.beta(counts + 1, social.CUES - counts + 1, size=(20_000, 2, 9)) + shift, 0, 1)
        p = 1 / (1 + np.exp(-np.einsum("od,nbd->nbo", social.WEIGHTS, draws - 0.5)))
        assert social.expected_reply_probabilities(counts, shift) == pytest.approx(p.mean(0), abs=0.02)


def test_signs_of_the_rule_are_the_dimensions_signs():
    signs = np.array([social.SIGNS[d] for d in social.DIMENSIONS])
    assert (np.sign(social.WEIGHTS) * signs >= 0).all()
    assert (social.WEIGHTS == 0).any()


def test_judge_reads_what_was_written():
    rng = np.random.default_rng(2)
    for _ in range(300):
        high = rng.random(3) < 0.5
        reply = social.write_reply("rent", high.astype(float), rng)
        assert social.judge_reply(reply) == tuple(high.astype(float))
    assert social.judge_reply("The dog is happy.") == (None, None, None)
    mixed = "That sounds hard. That is all."
    assert social.judge_reply(mixed).validation == 0.5


def test_slot_forms_differ_in_their_first_word():
    for _, high, low in social.SLOTS:
        first = [form.split()[0] for form in (*high, *low)]
        assert len(first) == len(set(first))


def test_instrument_answer_meets_its_schema():
    order = social.DIMENSIONS[::-1]
    answer = social.format_scores({d: i / 10 for i, d in enumerate(order)})
    jsonschema.validate(json.loads(answer), social.instrument_schema(order))
    assert list(json.loads(answer)) == list(order)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"validation_seeking": 2}, social.instrument_schema(order))
    positions = [social.instrument("x", order).index(d) for d in order]
    assert positions == sorted(positions)
