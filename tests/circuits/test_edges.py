"""Direct effects: bounded memory gives the same numbers, ablated rules reach the edges, and a plain autograd loop."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.attribution import top_nodes
from circuits.edges import Neurons, _groups, direct_effects
from circuits.metric import direction, log_probability
from circuits.rules import Rules

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

LONG = [[1, 40, 77, 9, 120, 33, 201, 8, 77, 30, 61]]


def traced(problem, n=40, seed=0, **options):
    network, metric = problem.network.row(0), problem.metric.row(0, torch.arange(len(LONG[0])))
    noise_LTN = torch.rand(
        torch.stack(network.neurons, 1)[0].shape, generator=torch.Generator().manual_seed(seed)
    )
    neurons = Neurons.from_mask(top_nodes(noise_LTN, n))
    return neurons, direct_effects(network, neurons, metric, **options)


def test_groups_of_targets_give_the_same_numbers(any_model, problem_of):
    """Memory bounds cut the targets into groups and prompts into prefixes; one target at a time is the extreme."""
    problem = problem_of(any_model, LONG)
    _, together = traced(problem)
    for max_bytes in (1, 300_000):
        _, apart = traced(problem, max_bytes=max_bytes)
        for name, column in vars(together).items():
            torch.testing.assert_close(
                getattr(apart, name), column, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_effects_reach_no_later_token_and_no_earlier_layer(llama, problem_of):
    neurons, effects = traced(problem_of(llama, LONG))
    n = len(neurons)
    back_nn = neurons.layer_n[:, None] <= neurons.layer_n
    later_nn = neurons.position_n[:, None] < neurons.position_n
    assert not effects.unit_Sn[:n][back_nn | later_nn].any()
    assert effects.unit_Sn[:n][~(back_nn | later_nn)].all()
    after_nT = torch.arange(len(LONG[0])) > neurons.position_n[:, None]
    assert not effects.embed_ST[:n][after_nT].any()


@pytest.mark.parametrize("rules", [Rules(half=False), Rules(gate="detached")])
def test_ablated_rules_reach_the_edges(llama, problem_of, rules):
    """D5: without the half rule a neuron's in-flow counts its gate twice; detached, only its up projection."""
    neurons, usual = traced(problem_of(llama, LONG))
    _, ablated = traced(problem_of(llama, LONG, rules=rules))
    n = len(neurons)
    if rules.half:
        torch.testing.assert_close(ablated.inflow(), usual.inflow())
        assert not torch.allclose(ablated.unit_Sn[:n], usual.unit_Sn[:n])
    else:
        torch.testing.assert_close(ablated.inflow()[:n], 2 * usual.inflow()[:n])
        torch.testing.assert_close(ablated.unit_Sn[:n], 2 * usual.unit_Sn[:n])


@pytest.mark.parametrize("kind", ["log-probability", "blocks.1.output"])
def test_in_sums_close_for_every_read_out(any_model, problem_of, kind):
    """I2 for metrics with a rest, and for directions of streams that lie below some of the neurons."""
    problem = problem_of(any_model, LONG)
    row, last = torch.arange(len(LONG[0])), torch.tensor([len(LONG[0]) - 1])
    if kind == "log-probability":
        metric = log_probability(problem.network.logits_BTV, last, [[3, 9]])
    else:
        vectors_KD = torch.randn(
            2, any_model.architecture.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        metric = direction(vectors_KD, last, kind)
    network = problem.network.row(0)
    everyone = Neurons.from_mask(torch.ones_like(torch.stack(network.neurons, 1)[0], dtype=torch.bool))
    effects = direct_effects(network, everyone, metric.row(0, row))
    torch.testing.assert_close(effects.value_S[-2:], metric.value(network.observed(metric))[0])
    scale_S = effects.neuron_Sn.abs().sum(1) + effects.embed_ST.abs().sum(1) + effects.own_S.abs()
    scale_S = scale_S.clamp_min(1e-30)  # nothing flows into an expert that was not chosen
    assert float(((effects.inflow() - effects.value_S).abs() / scale_S).max()) < 1e-10


def test_edges_equal_a_loop_over_pairs_of_layers(llama, problem_of):
    """Plain autograd through the model's own modules, one pair of layers at a time, everything else detached."""
    from _circuits_edges import loop_over_layer_pairs

    problem = problem_of(llama, LONG)
    neurons, effects = traced(problem)
    loop_Sn = loop_over_layer_pairs(llama, problem.batch, neurons, problem.metric)
    scale = effects.neuron_Sn.abs().amax(1, keepdim=True).clamp_min(1e-30)
    assert (
        float(((loop_Sn - effects.neuron_Sn).abs() / scale).max()) < 1e-5
    )  # norms, and the eager patterns of the loop, are float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 500))
def test_groups_are_bounded_and_complete(positions, max_rows):
    """D14: memory is linear in what a group may hold, however many targets there are; no target is swept twice."""
    position_S = torch.tensor(positions)
    groups = list(_groups(position_S, max_rows))
    assert sorted(torch.cat([targets for targets, _ in groups]).tolist()) == list(range(len(positions)))
    for targets, stop in groups:
        seen = position_S[targets] + 1
        assert int(seen.max()) == stop <= 2 * int(seen.min())
        assert len(targets) * stop <= max(max_rows, stop)
