"""CPR, CMD and minimality by hand-made curves and a circuit whose nodes are known; sizes fixed before the test."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.areas import PROPORTIONS, areas, proportion_sizes
from circuits.faithfulness import CurvePoint, curve, smallest_size
from circuits.minimality import minimality
from circuits.pathways import (
    REFERENCES,
    make_reference,
    mean_reference,
    neuron_activations,
    run_pathway,
    zero_reference,
)
from shared.errors import UserError
from shared.tokens import pad

ROWS = [[1, 40, 77, 9, 120], [1, 90, 13, 55, 7], [1, 8, 30, 61, 99]]


@pytest.fixture
def batch():
    return pad(ROWS, [5, 5, 5], 0)


def point(size, faithfulness, completeness=0.0, n=8):
    """A curve point of given ratios with examples of different gaps."""
    empty_B = torch.linspace(-1, 1, n, dtype=torch.float64)
    full_B = empty_B + torch.linspace(1, 3, n, dtype=torch.float64)
    parts = [empty_B + ratio * (full_B - empty_B) for ratio in (faithfulness, completeness)]
    return CurvePoint(size, *parts, full_B, empty_B)


def test_areas_are_those_of_the_trapezoids():
    points = [point(10, 0.2), point(100, 0.6), point(50, 0.4), point(1000, 1.3)]
    result = areas(points, 1000)
    share, f = np.array([0.01, 0.05, 0.1, 1.0]), np.array([0.2, 0.4, 0.6, 1.3])
    widths, log_widths = np.diff(share), np.diff(np.log10(share))
    distance = np.abs(1 - f)
    for axis, cpr, cmd, scale in (
        (widths, result.cpr, result.cmd, 1.0),
        (log_widths, result.cpr_log, result.cmd_log, log_widths.sum()),
    ):
        assert cpr.estimate == pytest.approx((axis * (f[1:] + f[:-1]) / 2).sum() / scale)
        assert cmd.estimate == pytest.approx((axis * (distance[1:] + distance[:-1]) / 2).sum() / scale)
        assert cpr.low == pytest.approx(cpr.high)  # every example has the same ratio


def test_areas_of_the_model_itself_are_one_and_zero():
    result = areas([point(size, 1.0) for size in proportion_sizes(10_000)], 10_000)
    assert result.cpr.estimate == pytest.approx(1 - PROPORTIONS[0])
    assert result.cpr_log.estimate == pytest.approx(1.0)
    assert result.cmd.estimate == result.cmd_log.estimate == pytest.approx(0.0)


def test_intervals_resample_examples():
    noisy = point(10, 0.5)
    noise = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = CurvePoint(10, noisy.circuit_B + noise, noisy.rest_B, noisy.full_B, noisy.empty_B)
    result = areas([noisy, point(100, 1.0)], 100)
    assert result.cpr.low < result.cpr.estimate < result.cpr.high
    assert noisy.gap().estimate == pytest.approx(2.0)
    assert noisy.gap().low < 2.0 < noisy.gap().high


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.lists(st.floats(1e-6, 1), min_size=1, max_size=12))
def test_a_label_is_the_value_used(total, proportions):
    """D9: sizes come from the shares themselves, each once, and say what share they are."""
    sizes = proportion_sizes(total, proportions)
    assert sizes == sorted(set(sizes))
    assert 1 <= sizes[0] <= sizes[-1] <= total
    for share in proportions:
        assert any(abs(size - share * total) <= max(0.5, 1 - share * total) for size in sizes)


def test_bad_curves_and_shares_are_refused():
    with pytest.raises(UserError, match="two or more"):
        areas([point(10, 0.5)], 100)
    with pytest.raises(UserError, match="between 1 and 50"):
        areas([point(10, 0.5), point(100, 0.5)], 50)
    with pytest.raises(UserError, match="above 0"):
        proportion_sizes(10, [0.0, 0.5])


def test_sizes_are_fixed_before_the_test():
    points = [point(200, 0.95, 0.05), point(10, 0.5, 0.4), point(50, 0.92, 0.2)]
    assert smallest_size(points, 0.9) == 50
    assert smallest_size(points, 0.9, completeness=0.1) == 200
    assert smallest_size(points, 0.99) is None


def test_curves_keep_what_their_size_says(llama, problem_of, batch):
    problem = problem_of(llama, ROWS, k=1)
    sizes = proportion_sizes(problem.activations_BLTN[0].numel(), [0.01, 0.1, 1.0])
    points = curve(llama, batch, problem.metric, problem.delta_BLTN, sizes, problem.reference_BLTN)
    assert [point.size for point in points] == sizes
    assert points[-1].faithfulness().estimate == 1.0
    assert points[-1].completeness().estimate == 0.0


def test_references_by_name(llama, batch):
    acts_BLTN = neuron_activations(llama, batch)
    assert torch.equal(make_reference(llama, "mean", batch), mean_reference(llama, batch))
    assert torch.equal(make_reference(llama, "zero", batch), zero_reference(llama))
    drawn_BLTN = make_reference(llama, "resample", batch, n_rows=7, seed=3)
    assert len(drawn_BLTN) == 7
    assert all(any(torch.equal(row, other) for other in acts_BLTN) for row in drawn_BLTN)
    assert torch.equal(drawn_BLTN, make_reference(llama, "resample", batch, n_rows=7, seed=3))
    assert not torch.equal(drawn_BLTN, make_reference(llama, "resample", batch, n_rows=7, seed=4))
    with pytest.raises(UserError, match=", ".join(REFERENCES)):
        make_reference(llama, "median", batch)
    with pytest.raises(UserError, match="one length"):
        make_reference(llama, "resample", pad([ROWS[0], [1, 2, 3]], [5, 3], 0))


def test_resampled_nodes_carry_another_prompts_values(llama, problem_of, batch):
    problem = problem_of(llama, ROWS, k=1)
    reference_BLTN = make_reference(llama, "resample", batch, n_rows=len(ROWS), seed=1)
    nothing = torch.zeros_like(problem.activations_BLTN[:1], dtype=torch.bool)
    logits_BTV = run_pathway(llama, batch, nothing, reference_BLTN)
    torch.testing.assert_close(run_pathway(llama, batch, ~nothing, reference_BLTN), llama(batch).detach())
    assert not torch.allclose(logits_BTV, problem.network.logits_BTV)


def test_need_is_what_is_lost_without_the_node(llama, problem_of, batch):
    problem = problem_of(llama, ROWS, k=1)
    keep_LTN = torch.zeros_like(problem.activations_BLTN[0], dtype=torch.bool)
    keep_LTN[0, 1, :20] = keep_LTN[2, 4, 3:9] = keep_LTN[2, 2, 5] = True
    result = minimality(llama, batch, problem.metric, keep_LTN, problem.reference_BLTN, controls=5)
    assert torch.equal(result.nodes_n3, keep_LTN.nonzero())
    assert len(result.outside_r3) == 5
    assert not keep_LTN[result.outside_r3.unbind(1)].any()

    def mean_value(mask_LTN):
        logits_BTV = run_pathway(llama, batch, mask_LTN[None], problem.reference_BLTN)
        return float(problem.metric.value(logits_BTV).mean())

    gap = mean_value(torch.ones_like(keep_LTN)) - mean_value(torch.zeros_like(keep_LTN))
    for entry in (0, 22):
        without = keep_LTN.clone()
        without[tuple(result.nodes_n3[entry])] = False
        loss = (mean_value(keep_LTN) - mean_value(without)) / gap
        assert float(result.need_n[entry]) == pytest.approx(loss)
    # a last-layer neuron at a token that no target reads changes nothing: no circuit needs it
    idle = (result.nodes_n3 == torch.tensor([2, 2, 5])).all(1)
    assert float(result.need_n[idle]) == 0.0
    assert 0 < result.minimal_share() < 1
