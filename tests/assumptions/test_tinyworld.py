"""Rung C on the committed model, where the truth is planted: read beyond words, steered by sign, controls beside."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assumptions.dimensions import NAMES, SIGNS
from assumptions.doses import dose_response, steer
from assumptions.evaluation import evaluate_probes
from assumptions.features import capture_features
from assumptions.forced import forced_scores
from assumptions.instruments import instrument
from assumptions.outcomes import Exchange, LexicalJudge
from assumptions.probes import fit_probes
from assumptions.settings import AssumptionProbingConfig, ChoiceSettings, SteeringSettings
from assumptions.sources import load_messages, moved_outcomes
from assumptions.splits import group_split
from assumptions.steered import Grounds, Steering, choose_directions
from assumptions.steering import probe_direction, random_directions
from assumptions.truth import (
    fitted_directions,
    planted_in,
    r2_by_dimension,
    reply_figures,
    steer_and_ask,
    truth_families,
)
from shared.generation import Sampling
from shared.models import load
from shared.runs import start_run
from shared.tinyworld import social


@pytest.fixture(scope="module")
def study():
    model = load("tinyworld")
    messages = load_messages("tinyworld", 400, seed=5, columns={})
    labels = torch.from_numpy(messages.posterior_BK)
    split = group_split(messages.chats, seed=0)
    features = capture_features(model, messages.chats)
    probes, chosen = fit_probes(features, labels, NAMES, split, "posterior")
    scores = evaluate_probes(features, labels, probes, chosen, split, messages.chats, shuffles=3)
    held = [messages.chats[i] for i in split.test]
    return model, held, probes, scores, features, labels, split, messages.chats


def test_the_residual_stream_holds_what_words_alone_do_not(study):
    scores = study[3]
    assert min(score.r2 for score in scores.values()) > 0.9
    assert min(score.auroc.auroc for score in scores.values()) > 0.95
    assert np.mean([score.r2_bag_of_words for score in scores.values()]) < 0.5
    assert np.mean([score.r2_shuffled for score in scores.values()]) < 0.1
    assert abs(np.mean([score.spearman_shuffled for score in scores.values()])) < 0.3
    assert np.mean([score.auroc_shuffled for score in scores.values()]) == pytest.approx(0.5, abs=0.2)


@pytest.fixture(scope="module")
def measured(study):
    model, _, probes, _, features, labels, split, chats = study
    grounds = Grounds(features, labels, split, chats, probes)
    planted = planted_in("tinyworld")
    asked = [chats[i] for i in split.test[:6]]
    families = truth_families(planted, grounds)
    families["bisector"] = fitted_directions(planted, grounds, "bisector")
    chosen = {kind: [some[k * len(some) // 9] for k in (0, 3, 4)] for kind, some in families.items()}
    chosen |= {kind: families[kind] for kind in ("true", "bisector")}
    return model, planted, families, asked, steer_and_ask(model, planted, chosen, asked)


class TestTruth:
    """Rung C: figures beside what was planted."""

    def test_expected_scores_follow_the_posterior(self, study):
        model, _, _, _, _, labels, split, chats = study
        scores = forced_scores(model, instrument("tinyworld_nine"), [chats[i] for i in split.test])
        assert min(r2_by_dimension(scores, labels[split.test].numpy()).values()) > 0.95

    def test_the_true_direction_moves_its_own_score_and_no_other(self, measured):
        true = measured[4]["true"]
        slopes = [one.estimate for one in true.on_target().values()]
        assert np.mean(slopes) >= 0.6
        assert np.mean(list(true.off_target().values())) <= 0.05
        assert min(true.rho().values()) >= 0.8

    @pytest.mark.parametrize("kind", ["ridge", "pattern", "bisector"])
    def test_directions_that_were_read_steer_nearly_as_well(self, measured, kind):
        """At least .7 in the mean; the bisector, on 240 labels without noise, .78, and .65 in its worst dimension."""
        one, true = measured[4][kind], measured[4]["true"]
        slopes, of_true = (
            dict(zip(some.targets, (slope.estimate for slope in some.on_target().values()), strict=True))
            for some in (one, true)
        )
        ratio = np.array([slope / of_true[name] for name, slope in slopes.items()])
        assert len(ratio) == (9 if kind == "bisector" else 3)
        assert ratio.mean() >= 0.7
        if kind == "bisector":
            assert ratio.mean() >= 0.78
            assert ratio.min() >= 0.65
            assert (ratio >= 0.7).sum() >= 8
        assert one.specificity() >= 10
        assert all(slope.estimate > 0 for slope in one.on_target().values())

    def test_random_directions_of_that_norm_move_nothing(self, measured):
        matrix = measured[4]["random"].matrix
        assert abs(matrix.mean()) < 0.03
        assert np.abs(matrix).max() <= 0.15

    def test_replies_follow_the_rule_and_move_by_its_signs(self, measured):
        model, planted, families, asked, _ = measured
        few = {kind: some[:2] for kind, some in families.items()}
        figures = reply_figures(model, planted, few, asked)
        assert min(figures["correlation"].values()) >= 0.95
        assert {figures[f"right_sign_{kind}"] for kind in ("true", "ridge", "pattern")} == {1.0}


def test_reading_is_not_control():
    """The second model holds its directions as readably, and says nothing else when it is pushed along them.

    It answers the instrument as well as the first; no training ever shifted a latent along these directions.
    """
    model = load("tinyworld-readable")
    messages = load_messages("tinyworld", 400, seed=6, columns={})
    latents = np.stack([turn.latents_9 for turn in social.sample_turns(400, seed=6)])
    split, planted = group_split(messages.chats), planted_in("tinyworld-readable")
    features = capture_features(model, messages.chats, sites=[f"blocks.{planted.block}.output"])
    truths = {"posterior": messages.posterior_BK, "latents": latents}
    for name, truth in truths.items():
        probes, _ = fit_probes(features, torch.from_numpy(truth), NAMES, split, name)
        read = np.stack([one.predict(features, split.test).numpy() for one in probes.probes.values()], axis=1)
        # No reader gets more than the posterior mean itself does, on these very messages.
        best = r2_by_dimension(messages.posterior_BK[split.test], truth[split.test])
        found = r2_by_dimension(read, truth[split.test])
        assert np.mean(list(found.values())) > np.mean(list(best.values())) - 0.02, name
    probes, _ = fit_probes(features, torch.from_numpy(messages.posterior_BK), NAMES, split, "posterior")
    asked = [messages.chats[i] for i in split.test[:8]]
    scores = forced_scores(model, instrument("tinyworld_nine"), asked)
    assert min(r2_by_dimension(scores, messages.posterior_BK[split.test[:8]]).values()) > 0.9
    grounds = Grounds(features, torch.from_numpy(messages.posterior_BK), split, messages.chats, probes)
    families = truth_families(planted, grounds)
    few = {"true": families["true"][::3], "ridge": families["ridge"][::3], "random": families["random"][::9]}
    closures = steer_and_ask(model, planted, few, asked)
    largest = np.abs(closures["random"].matrix).max()
    for kind in ("true", "ridge"):
        own = np.array([one.estimate for one in closures[kind].on_target().values()])
        assert abs(own.mean()) <= largest < 0.15  # a steerable model's slope is 0.7
        assert np.abs(own).max() < 0.2


def test_a_positive_dose_moves_replies_by_the_sign_of_its_dimension(study):
    model, chats, probes, *_ = study
    chats, sampling = chats[:16], Sampling(max_tokens=60, temperature=1.0, logprobs=None)
    directions = [
        probe_direction(probes.probes[name]) for name in ("validation_seeking", "objectivity_seeking")
    ]
    control = random_directions(directions[0], 1)
    replies = steer(model, chats, directions + control, [-3.0, 0.0, 3.0], sampling, batch_size=16)
    turns = {chat.id: chat.turn for chat in chats}
    judged = LexicalJudge().judge([Exchange(turns[reply.chat], reply.text) for reply in replies])
    slopes = []
    for direction in directions:
        curve = dose_response(replies, judged, direction, moved_outcomes("tinyworld", direction.dimension))
        slopes.append(curve.slope)
        assert curve.rho == SIGNS[direction.dimension]
        assert np.mean(curve.judged) > 0.9
    random = dose_response(replies, judged, control[0], moved_outcomes("tinyworld", "validation_seeking"))
    assert abs(random.slope) < min(map(abs, slopes))


def test_a_direction_steers_more_at_the_block_chosen_by_dose_response(study, tmp_path):
    """Block 2 reads objectivity_seeking as well as block 1 and hardly steers: the choice, on others, leaves it."""
    model, held, probes, _, features, labels, split, chats = study
    name = "objectivity_seeking"
    [late] = fit_probes(features.only(["blocks.2.output"]), labels, NAMES, split, probes.labeller)[:1]
    reading = replace(probes, probes=probes.probes | {name: late.probes[name]})
    assert late.probes[name].r2_validation > 0.98
    choice = ChoiceSettings(blocks=[1], random=1, messages=10)
    config = AssumptionProbingConfig(steering=SteeringSettings([name], max_tokens=48, choice=choice))
    with start_run(tmp_path / "run", {}, seed=0) as run:
        steering = Steering(config, run.use_model(model), LexicalJudge().judge, run)
        grounds = Grounds(features, labels, split, chats, reading)
        directions, trials = choose_directions(steering, grounds)
        places = [directions[name], replace(probe_direction(late.probes[name]), name="read")]
        chosen, read = steering.curves("test", held[:12], places, [-3.0, 0.0, 3.0]).values()
    assert (places[0].block, [one.block for one in trials[name]]) == (1, [2, 1])
    assert chosen.slope < 0
    assert abs(chosen.slope) > 1.5 * abs(read.slope)
