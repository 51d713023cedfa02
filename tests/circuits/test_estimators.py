"""Node scores against brute force and against their sum rules (I10, digest 1.5)."""

import pytest
import torch

from circuits.attribution import ESTIMATORS, attribute, exact_scores, top_nodes
from circuits.metric import MetricError, logit_difference, token_logits
from circuits.pathways import neuron_activations, run_pathway
from shared.errors import UserError


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


def test_ig_activations_sum_to_the_ablation_of_the_layer(llama, problem_of, relative):
    problem = problem_of(llama)
    scores_BKLTN = attribute(problem, "ig_activations")
    for layer in range(llama.architecture.n_layers):
        keep_BLTN = torch.ones_like(problem.activations_BLTN, dtype=torch.bool)
        keep_BLTN[:, layer] = False
        logits_BTV = run_pathway(llama, problem.batch, keep_BLTN, problem.reference_BLTN)
        change_BK = problem.metric.value(problem.network.logits_BTV) - problem.metric.value(logits_BTV)
        assert relative(scores_BKLTN[:, :, layer].sum((-1, -2)), change_BK) < 2e-2  # ten midpoint steps


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
    scores_BKLTN = attribute(problem, estimator)
    assert not scores_BKLTN[1, :, :, 5:].any()  # the second row is two tokens shorter
    assert scores_BKLTN[0].any()
    if estimator != "random":
        same = problem_of(llama, reference_BLTN=problem.activations_BLTN)
        assert not attribute(same, estimator).any()


def test_relp_takes_one_pass_and_no_gradients(llama, problem_of, monkeypatch):
    calls = []
    forward = type(llama).__call__
    monkeypatch.setattr(type(llama), "__call__", lambda self, batch: calls.append(1) or forward(self, batch))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("RelP needs no autograd"))
    attribute(problem_of(llama), "relp")
    assert len(calls) == 1


def test_a_metric_is_shift_invariant_when_demeaned(llama, problem_of):
    logits_BTV, at_B = problem_of(llama).network.logits_BTV, torch.tensor([6, 4])
    demeaned = token_logits(logits_BTV, at_B, [[3, 4], [5, 6]])
    torch.testing.assert_close(demeaned.value(logits_BTV + 7.0), demeaned.value(logits_BTV))
    difference = logit_difference(logits_BTV, at_B, [3, 5], [4, 6])
    torch.testing.assert_close(difference.value(logits_BTV + 7.0), difference.value(logits_BTV))
    torch.testing.assert_close(difference.value(logits_BTV)[0, 0], logits_BTV[0, 6, 3] - logits_BTV[0, 6, 4])
    with pytest.raises(MetricError, match="same number"):
        token_logits(logits_BTV, at_B, [[3], [5, 6]])


def test_activations_by_capture_are_those_of_the_network(llama, problem_of):
    problem = problem_of(llama)
    torch.testing.assert_close(neuron_activations(llama, problem.batch), problem.activations_BLTN)


def test_unknown_estimators_are_refused_by_name(llama, problem_of):
    with pytest.raises(UserError, match="relp"):
        attribute(problem_of(llama), "shap")


def test_top_nodes_by_absolute_score():
    scores_LTN = torch.tensor([[[0.1, -3.0], [2.0, 0.0]]])
    assert top_nodes(scores_LTN, 2).nonzero().tolist() == [[0, 0, 1], [0, 1, 0]]
    assert top_nodes(scores_LTN, 0).sum() == 0
    assert top_nodes(scores_LTN, 99).all()
