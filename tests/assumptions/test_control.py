"""The block to steer at: chosen by what steering does on validation messages, not by what can be read."""

from dataclasses import replace

import pytest
import torch

from assumptions.chats import Chat
from assumptions.conditions import Reply
from assumptions.control import (
    Trial,
    best,
    candidate_blocks,
    directions_by_block,
    doubts,
    trial,
    trial_family,
)
from assumptions.dimensions import NAMES
from assumptions.doses import Curve
from assumptions.engines import HFEngine
from assumptions.features import capture_features
from assumptions.outcomes import Judgement
from assumptions.probes import fit_probes
from assumptions.settings import AssumptionProbingConfig, ChoiceSettings, SteeringSettings
from assumptions.splits import group_split
from assumptions.steered import Grounds, Steering, choose_directions
from assumptions.steering import probe_direction, random_directions
from shared.data import read_rows
from shared.errors import UserError
from shared.generation import Completion
from shared.models import load
from shared.runs import start_run


def curve(slope, judged=(1.0, 1.0, 1.0), truncated=(0.0, 0.0, 0.0), kind="probe"):
    doses, means = [-1.0, 0.0, 1.0], [3.0 - slope, 3.0, 3.0 + slope]
    return Curve("x", kind, doses, means, means, means, 1.0, slope, list(truncated), list(judged))


class TestBest:
    def test_the_margin_over_the_steepest_random_direction_counts_not_the_slope(self):
        steep_anyway, own = Trial(0, 0.5, 0.45, 1.0), Trial(1, -0.3, 0.02, 1.0)
        assert best([steep_anyway, own], 0.1) is own
        assert own.margin == pytest.approx(0.28)

    def test_a_block_that_costs_coherence_is_not_taken_while_another_keeps_it(self):
        broken, weak = Trial(0, 2.0, 0.0, 0.5), Trial(1, 0.1, 0.0, 0.95)
        assert best([broken, weak], 0.1) is weak
        assert best([broken, weak], 0.6) is broken
        assert best([broken, replace(weak, coherence=0.4)], 0.1) is broken

    def test_where_nothing_could_be_judged_the_block_for_reading_stays(self):
        unknown = [Trial(block, float("nan"), 0.0, 1.0) for block in (2, 0, 1)]
        assert best(unknown, 0.1).block == 2


def test_coherence_is_the_worst_doses_share_of_readable_replies_over_the_unedited():
    direction = probe(load("random:llama"))[0]
    whole = trial(direction, [curve(0.2), curve(-0.05, kind="random"), curve(0.01, kind="random")])
    assert (whole.slope, whole.steepest_random, whole.coherence) == (0.2, 0.05, 1.0)
    assert trial(direction, [curve(0.2, judged=(0.4, 0.8, 0.8))]).coherence == pytest.approx(0.5)
    assert trial(direction, [curve(0.2, truncated=(0.5, 0.5, 0.75))]).coherence == pytest.approx(0.5)


def test_candidates_are_spread_over_the_depth_with_the_block_for_reading_first():
    assert candidate_blocks([], 4, reading=2) == [2, 0, 1, 3]
    assert candidate_blocks([], 80, reading=33) == [33, 0, 11, 23, 34, 45, 56, 68, 79]
    assert candidate_blocks([1], 4, reading=3) == [3, 1]
    assert candidate_blocks([], 1, reading=0) == [0]
    with pytest.raises(UserError, match=r"\[4\] are not blocks of this model, 0 to 3"):
        candidate_blocks([4], 4, reading=0)


def test_what_speaks_against_steering_is_said():
    read = probe(load("random:llama"))[1].probes["user_rightness"]
    wide = torch.linspace(0, 1, 100, dtype=torch.float64)
    assert doubts(replace(read, r2_validation=0.5), wide) == []
    assert "R2" in doubts(replace(read, r2_validation=0.01), wide)[0]
    flat, few = torch.full((100,), 0.8) + 1e-3 * wide.float(), wide[20:80]
    assert [reason.split()[0] for reason in doubts(replace(read, r2_validation=0.5), flat)] == ["labels", "0"]
    assert "10 labels below 0.3" in doubts(replace(read, r2_validation=0.5), few)[0]


ROWS = [Chat(str(i), f"about my {'rent' if i % 2 else 'job'}, {i * i}") for i in range(40)]


def probe(model):
    """A direction of made labels, and all that it came from."""
    labels = torch.rand(len(ROWS), 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split, features = group_split(ROWS), capture_features(model, ROWS)
    probes, _ = fit_probes(features, labels, NAMES, split, "made")
    return probe_direction(probes.probes["user_rightness"]), probes, features, labels, split


def test_at_the_block_for_reading_the_candidate_is_the_probe_itself():
    direction, probes, features, labels, split = probe(load("random:llama"))
    [same] = directions_by_block(
        features, labels, probes, split, "user_rightness", [direction.block], "probe"
    )
    assert same.block == direction.block
    torch.testing.assert_close(same.unit_D, direction.unit_D)
    assert (same.projection_sd, same.resid_norm) == pytest.approx(
        (direction.projection_sd, direction.resid_norm)
    )


def test_the_controls_of_the_choice_are_not_those_of_the_test():
    """A control that helped to choose would look flatter on the test messages than a fresh one."""
    direction = probe(load("random:llama"))[0]
    families = [trial_family(replace(direction, block=block), 2, seed=3) for block in (0, 1)]
    drawn = [tuple(one.unit_D.tolist()) for family in families for one in family[1:]]
    drawn += [tuple(one.unit_D.tolist()) for one in random_directions(direction, 2, seed=3)]
    assert len(set(drawn)) == 6
    assert len({one.name for family in families for one in family}) == 6


def test_the_block_whose_replies_the_judge_sees_move_is_taken(tmp_path, monkeypatch):
    """A judge that only one block's direction moves: that block is chosen, from replies to validation rows alone."""

    def said(self, condition, requests, acts, sampling):
        assert acts == [condition.dose != 0] * len(requests)
        return [[Completion(f"{condition.name} {condition.dose}", [], [], "stop")] for _ in requests]

    monkeypatch.setattr(HFEngine, "complete", said)
    model = load("random:llama")
    _, probes, features, labels, split = probe(model)
    choice = ChoiceSettings(random=1, messages=3)
    steering = SteeringSettings(["user_rightness"], max_tokens=2, choice=choice)
    config = AssumptionProbingConfig(steering=steering)
    for wanted in range(model.architecture.n_layers):

        def judge(exchanges, wanted=wanted):
            told = [exchange.reply.split() for exchange in exchanges]
            moved = [float(dose) * name.endswith(f"probe.block{wanted}") for name, dose in told]
            return [
                Judgement({"validation": None, "indirectness": None, "framing": 3 + x}, {}) for x in moved
            ]

        with start_run(tmp_path / str(wanted), {}, seed=0) as run:
            study = Steering(config, run.use_model(model), judge, run)
            directions, trials = choose_directions(study, Grounds(features, labels, split, ROWS, probes))
        assert directions["user_rightness"].block == wanted
        assert {one.block for one in trials["user_rightness"]} == set(range(model.architecture.n_layers))
        files = list((tmp_path / str(wanted) / "choice").glob("*.jsonl"))
        asked = {reply.chat for path in files for reply in read_rows(path, Reply)}
        assert asked == {ROWS[i].id for i in split.validation[:3]}


def test_a_run_that_was_stopped_goes_on_at_the_next_condition(tmp_path, monkeypatch):
    answered = []

    def said(self, condition, requests, acts, sampling):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(condition.key)
        return [[Completion("x", [], [], "stop")] for _ in requests]

    monkeypatch.setattr(HFEngine, "complete", said)
    model = load("random:llama")
    direction = probe(model)[0]
    judged = [Judgement({"validation": 1.0, "indirectness": None, "framing": None}, {})]

    def replies():
        with start_run(tmp_path / "run", {}, seed=0) as run:
            study = Steering(
                AssumptionProbingConfig(), run.use_model(model), lambda rows: judged * len(rows), run
            )
            return study.answer("x", ROWS[:2], study.dosed([direction], [-1.0, 0.0, 1.0])).replies

    with pytest.raises(KeyboardInterrupt):
        replies()
    assert answered == ["none@0", f"{direction.name}@-1"]
    answered.clear()
    assert [(one.direction, one.dose) for one in replies()][::2] == [
        ("none", 0.0), (direction.name, -1.0), (direction.name, 1.0)
    ]  # fmt: skip
    assert answered == [f"{direction.name}@1"]


def test_by_reading_nothing_is_answered(tmp_path):
    direction, probes, features, labels, split = probe(load("random:llama"))
    choice = ChoiceSettings(by="reading")
    config = AssumptionProbingConfig(steering=SteeringSettings(["user_rightness"], choice=choice))
    with start_run(tmp_path / "run", {}, seed=0) as run:
        study = Steering(config, load("random:llama"), pytest.fail, run)
        directions, trials = choose_directions(study, Grounds(features, labels, split, ROWS, probes))
    assert trials == {}
    assert directions["user_rightness"].digest == direction.digest
