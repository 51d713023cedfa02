"""Every kind of target: its value, its ledger, and its estimators agree on one definition (digest 1.2)."""

import pytest
import torch

from circuits.attribution import attribute, exact_scores, pose, top_nodes
from circuits.edge_circuits import edge_scores
from circuits.edges import Neurons, direct_effects
from circuits.faithfulness import curve
from circuits.metric import (
    MetricError,
    direction,
    log_probability,
    logit_difference,
    token_logits,
    top_logits,
)
from circuits.problem import read_out
from circuits.relp import relp
from circuits.rules import Rules
from circuits.surrogate import relp_by_autograd
from shared.hooks import capture
from shared.models import ModelConfig, load
from shared.tokens import pad

ROWS = [[1, 40, 77, 9, 120, 33, 201], [1, 90, 13, 55, 7, 8, 21]]
AT = torch.tensor([6, 6])


def vectors(model, k=2):
    shape = (k, model.architecture.width)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


TARGETS = {
    "logit": lambda model: lambda logits, at: token_logits(logits, at, [[3, 4]] * 2, demean=False),
    "demeaned": lambda model: lambda logits, at: token_logits(logits, at, [[3, 4]] * 2),
    "difference": lambda model: lambda logits, at: logit_difference(logits, at, [3, 5], [4, 6]),
    "mass": lambda model: lambda logits, at: top_logits(logits, at, 10, mass=0.3),
    "log-probability": lambda model: lambda logits, at: log_probability(logits, at, [[3, 4]] * 2),
    "final norm": lambda model: lambda logits, at: direction(vectors(model), at),
    "block 1": lambda model: lambda logits, at: direction(vectors(model), at, "blocks.1.output"),
    "block 2": lambda model: lambda logits, at: direction(vectors(model), at, "blocks.2.output"),
}


@pytest.fixture(scope="module")
def gpt2():
    return load(ModelConfig("random:gpt2", dtype="float64"))


@pytest.fixture
def problem(any_model, request):
    batch = pad(ROWS, [7, 7], 0)
    return pose(any_model, batch, TARGETS[request.param](any_model))


@pytest.mark.parametrize("problem", sorted(TARGETS), indirect=True)
def test_the_ledger_of_every_target_closes(problem):
    ledger = relp(problem.network, problem.metric).ledger
    assert ledger.error() < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(problem.values(), ledger.value_BK, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_edges_of_every_target_close(gpt2, name):
    problem = pose(gpt2, pad(ROWS, [7, 7], 0), TARGETS[name](gpt2))
    network, metric = problem.network.row(0), problem.metric.row(0, torch.arange(7))
    neurons = Neurons(*(torch.tensor(column) for column in ([0, 1, 2], [3, 6, 6], [5, 7, 9])))
    effects = direct_effects(network, neurons, metric)
    torch.testing.assert_close(effects.inflow(), effects.value_S, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_has_its_gradient_and_its_ablation(llama, name, relative):
    near = pose(llama, pad(ROWS, [7, 7], 0), TARGETS[name](llama)).activations_BLTN * 0.999
    problem = pose(llama, pad(ROWS, [7, 7], 0), TARGETS[name](llama), near)
    assert relative(attribute(problem, "relp"), relp_by_autograd(problem, Rules())) < 1e-12
    gradient_KLTN = attribute(problem, "atp")[0]
    nodes_n3 = gradient_KLTN[0, :2].abs().flatten(1).topk(2).indices  # of layers 0 and 1
    n = gradient_KLTN.shape[-1]
    nodes_n3 = torch.tensor([[layer, int(i) // n, int(i) % n] for layer in (0, 1) for i in nodes_n3[layer]])
    exact_nK = exact_scores(problem, 0, nodes_n3)
    linear_nK = gradient_KLTN[:, *nodes_n3.T].T
    # To first order: norms compute in float32, so the step cannot be smaller.
    assert relative(linear_nK[:, 0], exact_nK[:, 0]) < 0.1


def test_a_direction_below_the_top_ignores_the_blocks_above(llama):
    problem = pose(llama, pad(ROWS, [7, 7], 0), TARGETS["block 1"](llama))
    scores_BKLTN = attribute(problem, "relp")
    assert scores_BKLTN[:, :, :2].any()
    assert not scores_BKLTN[:, :, 2].any()
    with torch.no_grad(), capture(llama, ["blocks.1.output"]) as acts:
        llama(problem.batch)
    expected_BK = acts["blocks.1.output"][:, 6] @ vectors(llama).T
    torch.testing.assert_close(relp(problem.network, problem.metric).ledger.value_BK, expected_BK)


def test_log_probabilities_are_those_of_the_softmax(llama):
    problem = pose(llama, pad(ROWS, [7, 7], 0), TARGETS["log-probability"](llama))
    logits_BTV, metric = problem.network.logits_BTV, problem.metric
    expected_BK = logits_BTV[:, 6].log_softmax(-1)[:, [3, 4]]
    torch.testing.assert_close(metric.value(logits_BTV), expected_BK)
    probabilities_BV = logits_BTV[:, 6].softmax(-1)
    entropy_B = -(probabilities_BV * probabilities_BV.log()).sum(-1)
    torch.testing.assert_close(metric.rest(logits_BTV), -entropy_B[:, None].expand(-1, 2))
    torch.testing.assert_close(metric.value(logits_BTV + 7.0), expected_BK)


def test_demeaned_and_different_logits_have_no_free_constant():
    logits_BTV = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(0))
    for metric in (
        token_logits(logits_BTV, AT, [[3, 4], [5, 6]]),
        logit_difference(logits_BTV, AT, [3, 5], [4, 6]),
    ):
        torch.testing.assert_close(metric.value(logits_BTV + 7.0), metric.value(logits_BTV))
    difference = logit_difference(logits_BTV, AT, [3, 5], [4, 6]).value(logits_BTV)
    torch.testing.assert_close(difference[0, 0], logits_BTV[0, 6, 3] - logits_BTV[0, 6, 4])


def test_top_logits_until_a_probability_mass():
    probabilities_BV = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.97, 0.01, 0.01, 0.01]])
    logits_BTV = probabilities_BV.log()[:, None]
    metric = top_logits(logits_BTV, torch.tensor([0, 0]), k=4, mass=0.95)
    assert metric.tokens == ((0, 1, 2), (0,))
    assert metric.weights_BKV.shape[1] == 3
    assert not metric.weights_BKV[1, 1:].any()
    assert metric.weights_BKV[0].any(-1).all()
    assert top_logits(logits_BTV, torch.tensor([0, 0]), k=2, mass=0.95).tokens == ((0, 1), (0,))
    with pytest.raises(MetricError, match="probability"):
        top_logits(logits_BTV, torch.tensor([0, 0]), mass=95.0)


def test_bad_targets_are_refused(llama):
    logits_BTV = torch.zeros(2, 7, 30)
    with pytest.raises(MetricError, match="same number"):
        token_logits(logits_BTV, AT, [[3], [5, 6]])
    with pytest.raises(MetricError, match="final_norm"):
        direction(torch.zeros(1, 8), AT, "blocks.1.neurons")
    problem = pose(llama, pad(ROWS, [7, 7], 0), lambda logits, at: top_logits(logits, at, 1))
    with pytest.raises(MetricError, match="3 blocks"):
        problem.network.depth(direction(torch.zeros(1, 8), AT, "blocks.9.output"))


def test_rows_and_repeats_of_a_metric():
    logits_BTV = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(0))
    metric = log_probability(logits_BTV, AT, [[3, 4], [5, 6]])
    one = metric.row(1, torch.arange(1, 7))
    torch.testing.assert_close(one.value(logits_BTV[1:, 1:]), metric.value(logits_BTV)[1:])
    twice = metric.repeated(1, 2)
    torch.testing.assert_close(twice.value(logits_BTV[[1, 1]]), metric.value(logits_BTV)[[1, 1]])


@pytest.mark.parametrize("k", [1, 2])
def test_half_precision_models_are_scored_and_judged_in_working_precision(k):
    """What the pipeline does with a real model's preset: the metric made in the model's type reads either network."""
    model = load(ModelConfig("random:llama", dtype="bfloat16"))
    batch = model.encode(["ab", "cd"])

    def make_metric(logits_BTV, positions_B):
        logits_BTV = logits_BTV.to(model.dtype)
        return [
            logit_difference(logits_BTV, positions_B, [5, 6], [7, 8]),
            log_probability(logits_BTV, positions_B, [[5], [6]]),
        ][k - 1]

    problem = pose(model, batch, make_metric)
    assert problem.metric.weights_BKV.dtype == problem.values().dtype == torch.float32
    scores_BLTN = attribute(problem)[:, 0]
    [point] = curve(model, batch, problem.metric, scores_BLTN, [10], problem.reference_BLTN)
    assert point.full_B.dtype == torch.float32
    neurons = Neurons.from_mask(top_nodes(scores_BLTN.mean(0), 5))
    assert edge_scores(problem, neurons).isfinite().all()


@pytest.mark.parametrize("name", ["difference", "log-probability"])
def test_only_the_logits_that_are_read_are_computed(any_model, name):
    """Of a column in the middle, and of the last one: the same values as from all logits."""
    batch = pad(ROWS, [7, 7], 0)
    with torch.no_grad():
        logits_BTV = any_model(batch)
        for at in (torch.tensor([3, 6]), AT):
            metric = TARGETS[name](any_model)(logits_BTV, at)
            seen, read_BSV = read_out(any_model, batch, metric)
            assert read_BSV.shape[1] == 7 - int(at.min())
            torch.testing.assert_close(seen.value(read_BSV), metric.value(logits_BTV), rtol=0, atol=1e-10)
