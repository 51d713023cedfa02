"""Faithfulness and completeness: exact at the ends, by definition in between, and edits that really edit (I11)."""

import pytest
import torch

from circuits.faithfulness import CurvePoint, curve, evaluate
from circuits.pathways import mean_reference, run_pathway, zero_reference
from circuits.steering import Node, matched_random, nodes_of, replace_nodes, scale_nodes, side_effect
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import load_interventions, save_interventions
from shared.stats import bootstrap_interval
from shared.tokens import pad

ROWS = [[1, 40, 77, 9, 120], [1, 90, 13, 55, 7], [1, 8, 30, 61, 99]]


@pytest.fixture
def batch():
    return pad(ROWS, [5, 5, 5], 0)


@pytest.mark.parametrize("reference", ["zero", "mean"])
def test_ends_are_exact(llama, problem_of, batch, reference):
    reference_BLTN = zero_reference(llama) if reference == "zero" else mean_reference(llama, batch)
    problem = problem_of(llama, ROWS, k=1)
    nothing = torch.zeros_like(problem.activations_BLTN[:1], dtype=torch.bool)
    none, all_ = evaluate(llama, batch, problem.metric, [nothing, ~nothing], reference_BLTN)
    assert none.faithfulness().estimate == 0.0
    assert none.completeness().estimate == 1.0
    assert all_.faithfulness().estimate == 1.0
    assert all_.completeness().estimate == 0.0
    torch.testing.assert_close(all_.circuit_B, problem.metric.value(problem.network.logits_BTV)[:, 0])


def test_values_are_those_of_the_definition(llama, problem_of, batch):
    problem = problem_of(llama, ROWS, k=1)
    scores_BLTN = problem.activations_BLTN
    point = curve(llama, batch, problem.metric, scores_BLTN, [40], problem.reference_BLTN)[0]
    keep_BLTN = torch.stack([row.abs() >= row.abs().flatten().topk(40).values[-1] for row in scores_BLTN])
    logits = [run_pathway(llama, batch, mask, problem.reference_BLTN) for mask in (keep_BLTN, ~keep_BLTN)]
    torch.testing.assert_close(point.circuit_B, problem.metric.value(logits[0])[:, 0])
    torch.testing.assert_close(point.rest_B, problem.metric.value(logits[1])[:, 0])
    expected = (point.circuit_B - point.empty_B).mean() / (point.full_B - point.empty_B).mean()
    interval = point.faithfulness()
    assert interval.estimate == pytest.approx(float(expected))
    assert interval.low <= interval.estimate <= interval.high
    assert point.size == 40


def test_a_last_layer_neuron_survives(llama, problem_of, batch):
    """D6: the circuit of one last-layer neuron at the last token changes the logits there."""
    problem = problem_of(llama, ROWS, k=1)
    mask = torch.zeros_like(problem.activations_BLTN[:1], dtype=torch.bool)
    empty = run_pathway(llama, batch, mask, problem.reference_BLTN)
    mask[:, -1, -1, 7] = True
    one = run_pathway(llama, batch, mask, problem.reference_BLTN)
    assert not torch.equal(empty[:, -1], one[:, -1])
    assert torch.equal(empty[:, :-1], one[:, :-1])


def test_mean_reference_needs_one_length(llama):
    with pytest.raises(UserError, match=r"lengths \[3, 5\]"):
        mean_reference(llama, pad([ROWS[0], [1, 2, 3]], [5, 3], 0))


def test_edits_of_nodes_equal_pathways(llama, problem_of, batch):
    mask_LTN = torch.zeros_like(problem_of(llama, ROWS).activations_BLTN[0], dtype=torch.bool)
    for node in [(0, 1, 5), (0, 1, 9), (2, 4, 30), (1, 0, 95)]:
        mask_LTN[node] = True
    nodes = nodes_of(mask_LTN)
    mean_BLTN = mean_reference(llama, batch)
    for edits, reference_BLTN in (
        (scale_nodes(nodes, 0.0), zero_reference(llama)),
        (replace_nodes(nodes, zero_reference(llama)[0]), zero_reference(llama)),
        (replace_nodes(nodes, mean_BLTN[0]), mean_BLTN),
    ):
        with torch.no_grad(), edit(llama, edits):
            got = llama(batch)
        torch.testing.assert_close(got, run_pathway(llama, batch, ~mask_LTN[None], reference_BLTN))


def test_edits_are_saved_and_loaded(llama, batch, tmp_path):
    nodes = [Node(0, 1, 5), Node(2, None, 30)]
    edits = scale_nodes(nodes, 2.0)
    loaded = load_interventions(save_interventions(tmp_path / "edits", edits, llama), llama)
    results = []
    for chosen in (edits, loaded):
        with torch.no_grad(), edit(llama, chosen):
            results.append(llama(batch))
    assert torch.equal(*results)
    assert side_effect(llama, batch, edits) > 0
    assert side_effect(llama, batch, scale_nodes(nodes, 1.0)) == 0


def test_intervals_resample_whole_clusters():
    generator = torch.Generator().manual_seed(0)
    part, rest, full, empty = torch.rand(4, 12, generator=generator).double()
    clusters = tuple("aabbbccdddde")
    point = CurvePoint(1, part, rest, full + 1, empty, clusters)
    samples = (values.numpy() for values in (part, full + 1, empty))
    expected = bootstrap_interval(
        *samples, statistic=lambda p, f, e: (p - e).mean(-1) / (f - e).mean(-1), clusters=clusters
    )
    assert point.faithfulness() == pytest.approx(expected)
    assert point.faithfulness() != CurvePoint(1, part, rest, full + 1, empty).faithfulness()


def test_controls_match_layers_and_positions(llama):
    nodes = [Node(0, 1, 5), Node(0, 1, 6), Node(2, 2, 0)]
    control = matched_random(nodes, llama.architecture, seed=3)
    assert [node[:2] for node in control] == [node[:2] for node in nodes]
    assert not set(control) & set(nodes)
    assert len(set(control)) == 3
    assert control != matched_random(nodes, llama.architecture, seed=4)
    with pytest.raises(UserError, match="positions"):
        replace_nodes([Node(0, None, 1)], torch.zeros(1, 1, 4))
    with pytest.raises(UserError, match="2 positions"):
        replace_nodes([Node(0, 2, 1)], torch.zeros(1, 2, 4))
