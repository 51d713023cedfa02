"""Node scores against brute force and against their sum rules (I10, digest 1.5)."""

from collections import Counter

import pytest
import torch

from circuits.attribution import ESTIMATORS, Settings, attribute, exact_scores, top_nodes
from circuits.bases import BASES
from circuits.pathways import mean_reference, neuron_activations, node_activations, run_pathway
from circuits.problem import measure
from circuits.rules import Rules
from circuits.surrogate import relp_by_autograd
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Interchange
from shared.tokens import pad

FEW = Settings(steps=3)


def test_atp_is_the_derivative_of_a_real_edit(llama, problem_of):
    """With a reference close by, exact patching is AtP to first order (norms compute in float32: no smaller step)."""
    rows = [[1, 40, 77, 9]]
    near_BLTN = problem_of(llama, rows).activations_BLTN * 0.99
    problem = problem_of(llama, rows, k=1, reference_BLTN=near_BLTN)
    atp_LTN, relp_LTN = (attribute(problem, name)[0, 0] for name in ("atp", "relp"))
    nodes_n3 = top_nodes(atp_LTN, 12).nonzero()
    exact_n = exact_scores(problem, 0, nodes_n3, chunk=5)[:, 0]
    linear_n, frozen_n = (scores[tuple(nodes_n3.T)] for scores in (atp_LTN, relp_LTN))
    torch.testing.assert_close(linear_n, exact_n, rtol=5e-2, atol=0)
    assert float(((frozen_n - exact_n) / exact_n).abs().max()) > 0.2  # RelP is no derivative


def test_exact_scores_are_one_ablation_each(llama, problem_of):
    problem = problem_of(llama, [[1, 40, 77]])
    scores_BKLTN = attribute(problem, "exact")
    for node in [(1, 2, 30), (0, 2, 7), (2, 0, 95)]:
        keep_BLTN = torch.ones_like(problem.activations_BLTN, dtype=torch.bool)
        keep_BLTN[0, *node] = False
        logits_BTV = run_pathway(llama, problem.batch, keep_BLTN, problem.reference_BLTN)
        change_BK = problem.metric.value(problem.network.logits_BTV) - problem.metric.value(logits_BTV)
        torch.testing.assert_close(scores_BKLTN[0, :, *node], change_BK[0], rtol=1e-5, atol=1e-6)


def value_with(problem, site, x_BTX):
    with torch.no_grad(), edit(problem.model, Interchange(site, x_BTX)):
        return measure(problem.model, problem.batch, problem.metric)


@pytest.mark.parametrize(("basis", "steps"), [("neurons", 10), ("mlp_out", 10), ("heads", 48)])
def test_ig_activations_sum_to_the_ablation_of_the_layer(llama, problem_of, relative, basis, steps):
    """Random attention is large beside random embeddings, so its path bends more."""
    problem = problem_of(llama, basis=basis)
    scores_BKLTN = attribute(problem, "ig_activations", settings=Settings(steps=steps))
    full_BK = problem.metric.value(problem.network.logits_BTV)
    for layer, site in enumerate(problem.sites):
        zero_BTX = torch.zeros_like(problem.activations_BLTN[:, layer])
        change_BK = full_BK - value_with(problem, site, zero_BTX)
        assert relative(scores_BKLTN[:, :, layer].sum((-1, -2)), change_BK) < 2e-3


def paired(model, problem_of, **options):
    """A problem whose references are another prompt's values, embeddings included."""
    rows = [[1, 40, 77, 9, 120], [1, 13, 55, 7, 90]]
    batch = pad(list(reversed(rows)), [5, 5], 0)
    embed_BTD = node_activations(model, batch, "embeddings")[:, 0]
    nodes_BLTX = node_activations(model, batch, options.get("basis", "neurons"))
    return problem_of(model, rows, reference_BLTN=nodes_BLTX, embed_reference_BTD=embed_BTD, **options)


def change_of_inputs(problem):
    full_BK = problem.metric.value(problem.network.logits_BTV)
    return full_BK - value_with(problem, "embed", problem.embed_reference_BTD)


def test_ig_inputs_of_the_embeddings_sum_to_the_change_of_the_metric(llama, problem_of, relative):
    problem = paired(llama, problem_of, basis="embeddings")
    scores_BKLTN = attribute(problem, "ig_inputs", settings=Settings(steps=24))
    assert scores_BKLTN.shape[2:] == (1, 5, 1)  # one node a token
    assert relative(scores_BKLTN.sum((-1, -2, -3)), change_of_inputs(problem)) < 1e-3
    moved_one_layer = attribute(problem, "ig_activations", settings=Settings(steps=24))
    torch.testing.assert_close(moved_one_layer, scores_BKLTN)  # the same path


def test_conductance_of_every_cut_sums_to_the_change_of_the_metric(llama, problem_of, relative):
    problem = paired(llama, problem_of, basis="residual")
    scores_BKLTN = attribute(problem, "conductance", settings=Settings(steps=64))
    for layer in range(llama.architecture.n_layers):
        assert relative(scores_BKLTN[:, :, layer].sum((-1, -2)), change_of_inputs(problem)) < 1e-2
    coarse = attribute(problem, "conductance", settings=Settings(steps=8)).sum((-1, -2))
    fine_miss = (scores_BKLTN.sum((-1, -2)) - change_of_inputs(problem)[..., None]).abs().max()
    assert fine_miss < (coarse - change_of_inputs(problem)[..., None]).abs().max() / 10


@pytest.mark.parametrize("basis", sorted(BASES))
def test_relp_by_hand_is_relp_by_autograd(any_model, problem_of, relative, basis):
    """Two implementations of the rules: transposed products, and straight-through edits of the model's own pass."""
    problem = problem_of(any_model, basis=basis)
    assert relative(attribute(problem, "relp"), relp_by_autograd(problem, Rules())) < 1e-12


@pytest.mark.parametrize("name", ["relp_no_half", "relp_gate_detached"])
def test_ablations_of_the_gate_rule_follow_both_ways(llama, problem_of, relative, name):
    rules = Rules(half=False) if name == "relp_no_half" else Rules(gate="detached")
    problem = problem_of(llama)
    scores_BKLTN = attribute(problem, name)
    assert relative(scores_BKLTN, relp_by_autograd(problem, rules)) < 1e-12
    posed = problem_of(llama, rules=rules)  # the same rules for the whole problem, edges included
    torch.testing.assert_close(attribute(posed, "relp"), scores_BKLTN)
    assert relative(scores_BKLTN, attribute(problem, "relp")) > 1e-2


def test_what_conserves_and_what_does_not(llama, problem_of):
    """Embeddings sum to the metric under the rules that close, and miss it by much under each that does not."""
    problem = problem_of(llama, basis="embeddings")
    value_BK = problem.metric.value(problem.network.logits_BTV)

    def miss(name):
        total_BK = attribute(problem, name).sum((-1, -2, -3))
        return float(((total_BK - value_BK) / value_BK).abs().max())

    for name in ("relp", "relp_gate_detached"):
        assert miss(name) < 1e-10
    for name in ("relp_no_half", "relp_qk_open", "relp_norm_open", "atp"):
        assert miss(name) > 1e-2


def test_all_rules_open_is_the_gradient_but_for_the_neurons(llama, problem_of, relative):
    """The last layer's MLP outputs meet the final norm alone: with norms open, RelP is AtP there."""
    problem = problem_of(llama, basis="mlp_out")
    opened, gradient = (attribute(problem, name)[:, :, -1] for name in ("relp_norm_open", "atp"))
    assert relative(opened, gradient) < 1e-12
    assert relative(attribute(problem, "relp")[:, :, -1], gradient) > 1e-3


def test_relp_ig_of_one_point_at_the_end_would_be_relp(llama, problem_of, relative):
    """From a reference that lies next to the activations the path is a point."""
    near = problem_of(llama).activations_BLTN * (1 - 1e-6)
    problem = problem_of(llama, reference_BLTN=near)
    assert relative(attribute(problem, "relp_ig", settings=FEW), attribute(problem, "relp")) < 1e-4
    far = problem_of(llama)
    assert relative(attribute(far, "relp_ig", settings=FEW), attribute(far, "relp")) > 1e-2


@pytest.mark.parametrize("basis", sorted(BASES))
def test_exact_patching_in_every_basis_is_one_edit_each(llama, problem_of, basis):
    problem = problem_of(llama, [[1, 40, 77]], basis=basis)
    layer, position, node = (0, 1, 0) if basis == "embeddings" else (1, 1, 2)
    got_K = exact_scores(problem, 0, torch.tensor([[layer, position, node]]))[0]
    x_BTX = problem.activations_BLTN[:, layer].clone()
    size = problem.basis.group(llama.architecture)
    x_BTX[:, position, node * size : (node + 1) * size] = 0
    full_BK = problem.metric.value(problem.network.logits_BTV)
    torch.testing.assert_close(got_K, (full_BK - value_with(problem, problem.sites[layer], x_BTX))[0])
    assert got_K.abs().max() > 0


def test_heads_add_up_their_coordinates(llama, problem_of):
    problem, by_coordinate = problem_of(llama, basis="heads"), problem_of(llama, basis="attn_out")
    assert attribute(problem, "relp").shape[-1] == llama.architecture.n_heads
    for name in ("relp", "atp"):  # heads and what attention adds are one linear map apart
        heads, outputs = (attribute(each, name).sum(-1) for each in (problem, by_coordinate))
        torch.testing.assert_close(heads, outputs, rtol=1e-9, atol=1e-9)


def test_estimators_agree_on_a_linear_model(linear_model, problem_of, relative):
    """I10: identity activation, no norms, no attention: every estimator is exact patching."""
    problem = problem_of(linear_model, [[1, 40, 77]])
    expected = attribute(problem, "exact")
    for name in ("relp", "relp_qk_open", "relp_norm_open", "relp_ig", "atp", "ig_activations", "ig_inputs"):
        assert relative(attribute(problem, name, settings=FEW), expected) < 1e-10, name


def test_references_zero_mean_and_paired(llama, problem_of):
    rows = [[1, 40, 77], [1, 13, 55]]
    batch = pad(rows, [3, 3], 0)
    mean_LTN = mean_reference(llama, batch)
    problem = problem_of(llama, rows, reference_BLTN=mean_LTN)
    torch.testing.assert_close(problem.delta_BLTN.sum(0), torch.zeros_like(mean_LTN[0]))
    paired_problem = problem_of(llama, rows, reference_BLTN=node_activations(llama, batch).flip(0))
    torch.testing.assert_close(paired_problem.delta_BLTN[0], -paired_problem.delta_BLTN[1])
    with pytest.raises(UserError, match="same length"):
        problem_of(llama, rows, reference_BLTN=mean_LTN[:, :, :2])
    with pytest.raises(UserError, match="embeddings"):
        problem_of(llama, rows, embed_reference_BTD=torch.zeros(1, 2, 3))


def test_with_a_paired_prompt_relp_sums_to_the_frozen_change(llama, problem_of, relative):
    """Not to the model's: the coefficients are those of the clean prompt (the gap is what a report states)."""
    problem = paired(llama, problem_of, basis="embeddings")
    network, metric = problem.network, problem.metric
    total_BK = attribute(problem, "relp").sum((-1, -2, -3))
    ends = [network.embed_BTD, network.embed_BTD - problem.embed_delta_BTD]
    values = [network.value(network.forward(end[:, None]).expand(-1, 2, -1, -1), metric) for end in ends]
    assert relative(total_BK, values[0] - values[1]) < 1e-10
    assert relative(total_BK, change_of_inputs(problem)) > 1e-2


def test_last_layer_on_a_frozen_final_norm_is_linear(llama, problem_of, relative):
    """After the last MLP only the final norm is left: RelP and AtP differ there by the norm's derivative alone."""
    problem = problem_of(llama)
    relp_BKTN, atp_BKTN = attribute(problem, "relp")[:, :, -1], attribute(problem, "atp")[:, :, -1]
    block, norm = problem.network.blocks[-1], problem.network.final_norm
    seed_BKTD = problem.network.seed(problem.metric)
    # d(c x)/dx = c - x (x . c g) c^2/(gain D)-type term: subtract its projection by hand
    residual_BTD = _last_residual(problem)
    gain_D = llama.architecture.final_norm.gain.detach()
    rms2_BT = residual_BTD.pow(2).mean(-1) + llama.architecture.final_norm.eps
    inner_BKT = torch.einsum("btd,bktd->bkt", residual_BTD, seed_BKTD)
    correction_BKTD = (inner_BKT / (residual_BTD.shape[-1] * rms2_BT)[:, None])[..., None] * residual_BTD[
        :, None
    ]
    expected_BKTN = (
        block.write_transpose(seed_BKTD - correction_BKTD) * problem.activations_BLTN[:, -1][:, None]
    )
    assert norm.scale_BTD.shape[-1] == gain_D.shape[0]
    assert relative(atp_BKTN, expected_BKTN) < 1e-5  # the model's norm computes in float32
    assert relative(relp_BKTN, expected_BKTN) > 1e-3


def _last_residual(problem):
    network = problem.network
    return network.forward(network.embed_BTD[:, None])[:, 0]


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"exact"}))
def test_padding_and_zero_difference_score_nothing(llama, problem_of, estimator):
    problem = problem_of(llama)
    scores_BKLTN = attribute(problem, estimator, settings=FEW)
    assert not scores_BKLTN[1, :, :, 5:].any()  # the second row is two tokens shorter
    assert scores_BKLTN[0].any()
    if estimator not in ("random", "magnitude", "conductance"):  # conductance compares along the path alone
        same = problem_of(llama, reference_BLTN=problem.activations_BLTN)
        assert not attribute(same, estimator, settings=FEW).any()


PASSES = {  # forward and backward passes of attribute, for L layers, K targets, n steps; RelP's own pass is pose's
    "relp": (0, 0),
    "relp_no_half": (1, 0),
    "relp_gate_detached": (1, 0),
    "relp_qk_open": (1, 2),
    "relp_norm_open": (1, 2),
    "relp_ig": (3 * 3, 0),
    "atp": (1, 2),
    "ig_activations": (3 * 3, 2 * 3 * 3),
    "ig_inputs": (3, 2 * 3),
    "conductance": (2 * 3 + 1, 2 * 3),
    "activation": (0, 0),
    "magnitude": (0, 0),
    "random": (0, 0),
}


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_takes_the_passes_it_states(llama, problem_of, monkeypatch, name):
    """Fault D11: no estimator runs a pass a layer that one pass for all layers gives."""
    calls, forward, grad = Counter(), type(llama).__call__, torch.autograd.grad
    problem = problem_of(llama, [[1, 40, 77]], basis="heads" if name == "exact" else "neurons")

    def counted(kind, function):
        return lambda *args, **options: calls.update([kind]) or function(*args, **options)

    monkeypatch.setattr(type(llama), "__call__", counted("forward", forward))
    monkeypatch.setattr(torch.autograd, "grad", counted("backward", grad))
    attribute(problem, name, settings=Settings(steps=3, chunk=4))
    expected = (9, 0) if name == "exact" else PASSES[name]  # 3 layers x 3 positions x 4 heads, 4 a pass
    assert (calls["forward"], calls["backward"]) == expected


def test_posing_takes_one_pass(llama, problem_of, monkeypatch):
    calls, forward = [], type(llama).__call__
    monkeypatch.setattr(type(llama), "__call__", lambda self, batch: calls.append(1) or forward(self, batch))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("RelP needs no autograd"))
    attribute(problem_of(llama, basis="residual"), "relp")
    assert len(calls) == 1


def test_long_loops_show_progress(llama, problem_of):
    seen = []
    settings = Settings(steps=2, progress=lambda items, label: (seen.append((label, len(items))), items)[1])
    for name in ("ig_activations", "ig_inputs", "conductance", "relp_ig"):
        attribute(problem_of(llama, [[1, 40]]), name, settings=settings)
    assert seen == [("layers", 3), ("steps", 2), ("steps", 2), ("layers", 3)]


def test_activations_by_capture_are_those_of_the_network(llama, problem_of):
    problem = problem_of(llama)
    torch.testing.assert_close(neuron_activations(llama, problem.batch), problem.activations_BLTN)


def test_unknown_estimators_are_refused_by_name(llama, problem_of):
    with pytest.raises(UserError, match="relp"):
        attribute(problem_of(llama), "shap")
    with pytest.raises(UserError, match="mlp_out"):
        problem_of(llama, basis="sae")


def test_top_nodes_by_absolute_score():
    scores_LTN = torch.tensor([[[0.1, -3.0], [2.0, 0.0]]])
    assert top_nodes(scores_LTN, 2).nonzero().tolist() == [[0, 0, 1], [0, 1, 0]]
    assert top_nodes(scores_LTN, 0).sum() == 0
    assert top_nodes(scores_LTN, 99).all()
