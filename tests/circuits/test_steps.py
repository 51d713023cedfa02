"""The capitals study on the embedded model: sets found on training prompts carry held-out cities, controls do not."""

import pytest
import torch

from circuits.concepts_report import swap_rate
from circuits.pipeline_concepts import named_neurons
from circuits.step_data import QUESTIONS, make_step_data
from circuits.steps import SETS, find_effect, find_sets, judge, overlap, random_like
from circuits.tasks import TaskError
from shared.serialize import plain
from shared.tinyworld.facts import CAPITALS, CITIES


@pytest.fixture(scope="module")
def data(world):
    return make_step_data(world)


@pytest.fixture(scope="module")
def sets(data):
    return find_sets(data, 50)


@pytest.fixture(scope="module")
def effects(data, sets):
    return judge(data, sets)


def test_every_city_is_on_one_side_and_questions_are_about_its_state(data):
    train, test = ({c for names in data.cities[part].values() for c in names} for part in ("train", "test"))
    assert not train & test
    assert {CITIES[city] for city in test} == set(data.states)
    for name, question in QUESTIONS.items():
        for half in (data.studies[name].train, data.studies[name].test):
            for example in half.examples:
                assert CITIES[example.groups[0]] == example.labels["state"] != example.labels["other state"]
                about = example.groups[0] if question.about_city else example.labels["state"]
                assert about in example.pair.clean
                assert question.about_city or example.groups[0] not in example.pair.clean


def test_sets_have_their_size_and_controls_match_layers(sets):
    for name in SETS:
        assert sets[name].sum((1, 2)).unique().tolist() == [50]
        control = random_like(sets[name], 1)
        assert torch.equal(control.sum(-1), sets[name].sum(-1))
        assert not (control & sets[name]).any()
    same, other = overlap(sets, "first", "first")
    assert same == 1
    assert 0 <= other < 0.2


def test_the_model_answers_all_three_questions(effects):
    for question in QUESTIONS:
        effect = find_effect(effects, "none", "none", question)
        assert effect.own.estimate >= 0.9
        assert effect.other.estimate == 0


def test_the_steps_are_dissociated_on_held_out_cities(effects):
    rate = {(n, q): find_effect(effects, n, "swapped", q).other.estimate for n in SETS for q in QUESTIONS}
    assert rate["first", "state"] >= 0.9
    assert rate["second", "both"] >= 0.9
    assert rate["second", "capital"] >= 0.9
    assert max(rate["first", "both"], rate["second", "state"]) <= 0.5
    for name in SETS:
        for question in QUESTIONS:
            assert find_effect(effects, f"{name}: random", "swapped", question).other.estimate <= 0.05
    assert swap_rate(plain(effects), "second", "both")[0] == rate["second", "both"]


def test_the_steps_say_their_answers(world, data, sets):
    """Without any forward pass of the answer: what a state's neurons together write to the vocabulary."""
    rows = named_neurons(world, data, sets)
    said = {(row["step"], row["state"]): row["says"][0] for row in rows}
    states = sum(said["first", state] == state for state in data.states)
    capitals = sum(said["second", state] == CAPITALS[state] for state in data.states)
    assert min(states, capitals) >= 0.9 * len(data.states)


def test_a_tokenizer_without_the_words_is_refused(llama):
    with pytest.raises(TaskError, match="needs four"):
        make_step_data(llama)
