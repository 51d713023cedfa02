"""Rung C on the committed model, where the truth is planted: read beyond words, steered by sign, controls beside."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assumptions.dimensions import NAMES, SIGNS
from assumptions.doses import dose_response, steer
from assumptions.evaluation import evaluate_probes
from assumptions.features import capture_features
from assumptions.outcomes import Exchange, LexicalJudge
from assumptions.probes import fit_probes
from assumptions.settings import AssumptionProbingConfig, ChoiceSettings, SteeringSettings
from assumptions.sources import load_messages, moved_outcomes
from assumptions.splits import group_split
from assumptions.steered import Grounds, Steering, choose_directions
from assumptions.steering import probe_direction, random_directions
from shared.generation import Sampling
from shared.models import load
from shared.runs import start_run


@pytest.fixture(scope="module")
def study():
    model = load("tinyworld")
    messages = load_messages("tinyworld", 240, seed=5, columns={})
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
