"""Edges intervened on in the real model: exact ends, exact pathways, and hooks edge by edge as the reference (D8)."""

import pytest
import torch

from circuits.attribution import top_nodes
from circuits.edge_circuits import EDGE_ESTIMATORS, edge_curve, edge_scores, evaluate_edges, top_edges
from circuits.edge_patching import EdgeSet, causal_pairs, run_edges
from circuits.edges import Neurons
from circuits.pathways import Keep, mean_reference, neuron_activations, run_pathway
from shared.errors import UserError
from shared.hooks import capture, edit
from shared.interventions import Interchange
from shared.tokens import pad

ROWS = [[1, 40, 77, 9, 120], [1, 90, 13, 55, 7], [1, 8, 30, 61, 99]]


@pytest.fixture
def batch():
    return pad(ROWS, [5, 5, 5], 0)


@pytest.fixture
def setting(llama, problem_of, batch):
    """Three prompts with two targets, a mean reference, and 40 scattered neurons of all layers."""
    problem = problem_of(llama, ROWS, k=2)
    noise_LTN = torch.rand(problem.activations_BLTN.shape[1:], generator=torch.Generator().manual_seed(1))
    return problem, mean_reference(llama, batch), Neurons.from_mask(top_nodes(noise_LTN, 40))


def value(problem, logits_BTV):
    return problem.metric.value(logits_BTV)


def all_neurons(problem):
    return Neurons.from_mask(torch.ones_like(problem.activations_BLTN[0], dtype=torch.bool))


def no_edges(neurons, problem):
    return EdgeSet(neurons, torch.zeros_like(causal_pairs(neurons, problem.metric.positions_BK)))


def test_every_edge_is_the_model_and_none_is_the_reference(any_model, problem_of, batch):
    problem, reference = problem_of(any_model, ROWS, k=2), mean_reference(any_model, batch)
    every = all_neurons(problem)
    pairs = EdgeSet(every, causal_pairs(every, problem.metric.positions_BK))
    full_BK = value(problem, problem.network.logits_BTV)
    torch.testing.assert_close(run_edges(any_model, batch, problem.metric, pairs, reference), full_BK)
    nothing = torch.zeros(problem.activations_BLTN[:1].shape, dtype=torch.bool)
    empty_BK = value(problem, run_pathway(any_model, batch, nothing, reference))
    none = no_edges(every, problem)
    torch.testing.assert_close(run_edges(any_model, batch, problem.metric, none, reference), empty_BK)
    cut_BK = run_edges(any_model, batch, problem.metric, none, reference, cut=True)
    torch.testing.assert_close(cut_BK, full_BK)
    assert float((full_BK - empty_BK).abs().min()) > 1e-3


def test_all_pairs_of_some_nodes_are_their_pathway(llama, setting, batch):
    problem, reference, neurons = setting
    mask_BLTN = torch.zeros_like(problem.activations_BLTN[:1], dtype=torch.bool)
    mask_BLTN[0, neurons.layer_n, neurons.position_n, neurons.index_n] = True
    pathway_BK = value(problem, run_pathway(llama, batch, mask_BLTN, reference))
    pairs = EdgeSet(neurons, causal_pairs(neurons, problem.metric.positions_BK))
    torch.testing.assert_close(run_edges(llama, batch, problem.metric, pairs, reference), pathway_BK)
    assert not torch.allclose(pathway_BK, value(problem, problem.network.logits_BTV))


def read_under(model, batch, edits, node):
    layer, position, index = node
    site = f"blocks.{layer}.neurons"
    with torch.no_grad(), capture(model, [site]) as acts, edit(model, edits):
        model(batch)
    return acts[site][:, position, index]


def held(values_BLTN, skip=()):
    """Every layer's neurons at given values, but for the layers in `skip`."""
    layers = range(values_BLTN.shape[1])
    return [Interchange(f"blocks.{at}.neurons", values_BLTN[:, at]) for at in layers if at not in skip]


def chain(neurons, problem, distance):
    """Neurons a -> b -> the second target, b one layer later and `distance` tokens on (a not at the common token)."""
    layer_n, position_n = neurons.layer_n, neurons.position_n
    apart_nn = position_n - position_n[:, None] == distance
    pairs_nn = apart_nn & ((layer_n == 0) & (position_n > 0))[:, None] & (layer_n == 1)
    a, b = pairs_nn.nonzero()[0].tolist()
    nodes = list(zip(layer_n.tolist(), position_n.tolist(), neurons.index_n.tolist(), strict=True))
    edges = no_edges(neurons, problem)
    return edges, a, b, nodes[a], nodes[b]


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_a_chain_of_edges_is_what_hooks_make_of_it(llama, setting, batch, distance):
    problem, reference, neurons = setting
    edges, a, b, node_a, node_b = chain(neurons, problem, distance)
    edges.mask_Sn[b, a] = True
    edges.mask_Sn[len(neurons) + 1, b] = True
    got_BK = run_edges(llama, batch, problem.metric, edges, reference)

    values = reference.expand_as(problem.activations_BLTN).clone()  # everything at its reference
    a_B = read_under(llama, batch, held(values, skip=[node_a[0]]), node_a)
    seen_by_b = values.clone()
    seen_by_b[:, node_a[0], node_a[1], node_a[2]] = a_B
    b_B = read_under(llama, batch, held(seen_by_b, skip=[node_b[0]]), node_b)
    seen_by_logit = values.clone()
    seen_by_logit[:, node_b[0], node_b[1], node_b[2]] = b_B
    with torch.no_grad(), edit(llama, held(values)):
        empty_BK = value(problem, llama(batch))
    with torch.no_grad(), edit(llama, held(seen_by_logit)):
        logit_BK = value(problem, llama(batch))
    torch.testing.assert_close(got_BK[:, 1], logit_BK[:, 1])
    torch.testing.assert_close(got_BK[:, 0], empty_BK[:, 0])  # no edge leads to the first target
    assert not torch.equal(b_B, read_under(llama, batch, held(values, skip=[node_b[0]]), node_b))


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_a_cut_edge_is_path_patching_with_hooks(llama, setting, batch, distance):
    """The target sees the source at its reference and all else as it is; the model then reacts to the target alone."""
    problem, reference, neurons = setting
    edges, a, b, node_a, node_b = chain(neurons, problem, distance)
    edges.mask_Sn[b, a] = True
    got_BK = run_edges(llama, batch, problem.metric, edges, reference, cut=True)
    patched = neuron_activations(llama, batch)
    patched[:, node_a[0], node_a[1], node_a[2]] = reference[:, node_a[0], node_a[1], node_a[2]]
    b_B = read_under(llama, batch, held(patched, skip=[node_b[0]]), node_b)
    new_BTN = neuron_activations(llama, batch)[:, node_b[0]]
    new_BTN[:, node_b[1], node_b[2]] = b_B
    keep_BTN = torch.ones(1, *new_BTN.shape[1:], dtype=torch.bool)
    keep_BTN[:, node_b[1], node_b[2]] = False
    only_b = Keep(f"blocks.{node_b[0]}.neurons", keep_BTX=keep_BTN, reference_BTX=new_BTN)
    with torch.no_grad(), edit(llama, only_b):
        expected_BK = value(problem, llama(batch))
    torch.testing.assert_close(got_BK, expected_BK)
    assert not torch.equal(expected_BK, value(problem, problem.network.logits_BTV))


def test_examples_are_independent_of_their_batch(llama, setting, batch):
    problem, reference, neurons = setting
    edges = EdgeSet(neurons, causal_pairs(neurons, problem.metric.positions_BK))
    edges.mask_Sn[:, ::3] = False
    together = run_edges(llama, batch, problem.metric, edges, reference)
    alone = run_edges(llama, batch, problem.metric, edges, reference, max_tokens=1)
    torch.testing.assert_close(together, alone)
    own = reference + 0.1 * problem.activations_BLTN  # one reference an example
    torch.testing.assert_close(
        run_edges(llama, batch, problem.metric, edges, own),
        run_edges(llama, batch, problem.metric, edges, own, max_tokens=1),
    )


def test_a_last_layer_neuron_carries_its_edge(llama, setting, batch):
    """D6: it has no outgoing edge to a neuron, and still acts on the logits, through its edge only."""
    problem, reference, _ = setting
    last = llama.architecture.n_layers - 1
    neurons = Neurons(torch.tensor([0, last]), torch.tensor([4, 4]), torch.tensor([3, 7]))
    edges = no_edges(neurons, problem)
    empty_BK = run_edges(llama, batch, problem.metric, edges, reference)
    edges.mask_Sn[1, 0] = True
    assert torch.equal(run_edges(llama, batch, problem.metric, edges, reference), empty_BK)
    edges.mask_Sn[2:, 1] = True
    assert bool((run_edges(llama, batch, problem.metric, edges, reference) != empty_BK).all())


def test_edges_that_lead_back_and_ragged_prompts_are_refused(llama, setting, batch):
    problem, reference, neurons = setting
    mask_Sn = ~causal_pairs(neurons, problem.metric.positions_BK)
    with pytest.raises(UserError, match="lead back"):
        run_edges(llama, batch, problem.metric, EdgeSet(neurons, mask_Sn), reference)
    with pytest.raises(UserError, match="expected"):
        run_edges(llama, batch, problem.metric, EdgeSet(neurons, mask_Sn[:-1]), reference)
    ragged = pad([ROWS[0], ROWS[1][:3], ROWS[2]], [5, 3, 5], 0)
    with pytest.raises(UserError, match=r"lengths \[3, 5\]"):
        run_edges(llama, ragged, problem.metric, no_edges(neurons, problem), reference)


def test_the_users_hooks_survive(llama, setting, batch):
    """D16: a forward hook on a down projection is called, and is still there."""
    problem, reference, neurons = setting
    calls = []
    module = llama.hf.get_submodule("model.layers.1.mlp.down_proj")
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        before = llama(batch)
        run_edges(llama, batch, problem.metric, no_edges(neurons, problem), reference)
        assert len(module._forward_hooks) == 1
        assert len(calls) == 2
        assert torch.equal(llama(batch), before)
    finally:
        handle.remove()


def test_relp_scores_are_direct_effects_times_total_effects(llama, problem_of, setting):
    """Their sum over a target's sources, with every neuron a node, is the target's share but for token edges."""
    from circuits.edges import direct_effects
    from circuits.relp import relp

    problem, _, neurons = setting
    scores_Sn = edge_scores(problem, neurons, "relp")
    expected_Sn = torch.zeros_like(scores_Sn)
    for row in range(len(ROWS)):
        network, metric = problem.network.row(row), problem.metric.row(row, torch.arange(5))
        effects = direct_effects(network, neurons, metric)
        unit_n = neurons.gather(relp(network, metric).sensitivity_BKLTN[0].sum(0))
        expected_Sn += effects.neuron_Sn * torch.cat([unit_n, torch.ones(2)])[:, None]
    torch.testing.assert_close(scores_Sn, expected_Sn / len(ROWS))
    assert not scores_Sn[~causal_pairs(neurons, problem.metric.positions_BK)].any()


@pytest.mark.parametrize("estimator", list(EDGE_ESTIMATORS))
def test_every_ranking_gives_edges_that_can_be_run(llama, problem_of, setting, batch, estimator):
    problem, reference, neurons = setting
    scores_Sn = edge_scores(problem, neurons, estimator)
    problem = problem_of(llama, ROWS, k=1)
    scores_Sn = scores_Sn[:-1]
    points = edge_curve(llama, batch, problem.metric, neurons, scores_Sn, [5, 10**6], reference)
    assert [point.size for point in points] == [5, int((scores_Sn != 0).sum())]
    kept = top_edges(neurons, scores_Sn, 5).mask_Sn
    assert float(scores_Sn[kept].abs().min()) >= float(scores_Sn[~kept].abs().max())
    whole_B = problem.metric.value(problem.network.logits_BTV)[:, 0]
    torch.testing.assert_close(points[0].full_B, whole_B, rtol=0, atol=1e-12)


def test_no_edges_have_faithfulness_zero_and_cutting_none_has_completeness_one(
    llama, problem_of, setting, batch
):
    problem, reference, neurons = problem_of(llama, ROWS, k=1), *setting[1:]
    [point] = evaluate_edges(llama, batch, problem.metric, [no_edges(neurons, problem)], reference)
    assert point.faithfulness().estimate == pytest.approx(0.0, abs=1e-10)
    assert point.completeness().estimate == pytest.approx(1.0, abs=1e-10)


def test_unknown_estimators_are_refused(setting):
    problem, _, neurons = setting
    with pytest.raises(UserError, match="direct, magnitude, random"):
        edge_scores(problem, neurons, "weight")
