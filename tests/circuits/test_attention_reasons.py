"""Attribution of one attention score: both sides' values are the score, and their ledgers close."""

import pytest
import torch

from circuits.attention_reasons import AttentionEdge, attention_reasons
from circuits.linearize import heads_of, rotated
from circuits.metric import MetricError
from circuits.relp import relp

ROW = [1, 40, 77, 9, 120, 33, 201]
EDGE = AttentionEdge(layer=2, head=3, query=5, key=2)


def test_both_sides_sum_to_the_score(any_model, problem_of):
    problem = problem_of(any_model, [ROW])
    found = attention_reasons(any_model, problem.batch, problem.network, EDGE)
    first, scores_BGPS = problem.network.blocks[2].attention.scores(torch.tensor([EDGE.query]))
    if problem.network.blocks[2].attention.soft_cap is None:
        score = scores_BGPS.flatten(1, 2)[0, EDGE.head, EDGE.key - first]
        assert found.score == pytest.approx(float(score), rel=1e-9)
    for reason in (found.query, found.key):
        ledger = relp(problem.network, reason.metric).ledger
        # Norms of queries and keys compute in float32 even in a float64 model, and may scale by the formula there.
        assert float(ledger.value_BK[0, 0]) + reason.constant == pytest.approx(
            found.score, rel=1e-5, abs=1e-6
        )
        assert ledger.error() < 1e-10
    assert 0 < found.weight < 1


def test_a_sides_direction_is_that_of_a_real_edit(llama, problem_of):
    """Move the stream at the key along a neuron's write: the score moves by the direction, norms held."""
    problem = problem_of(llama, [ROW])
    found = attention_reasons(llama, problem.batch, problem.network, EDGE)
    block, below = problem.network.blocks[2], problem.network.blocks[1]
    step_D = 0.1 * below.weights.down_DN[:, 7]
    stream_BKTD = below.output_BTD[:, None].clone()
    stream_BKTD[:, :, EDGE.key] += step_D
    keys_BTX = block.attn_norm.forward(stream_BKTD)[:, 0] @ block.weights.view.W_k.T
    heads = heads_of(llama, 2, "k", keys_BTX.detach())
    _, key_BGTd = rotated(llama, problem.batch, 2, heads, heads)
    attention = block.attention
    query_d = attention.query_BHTd[0, EDGE.head, EDGE.query]
    moved = attention.scaling * query_d @ key_BGTd[0, EDGE.head // attention.groups, EDGE.key]
    expected = step_D @ found.key.metric.weights_BKV[0, 0]
    assert float(expected.abs()) > 1e-4
    torch.testing.assert_close(moved - found.score, expected, rtol=1e-6, atol=1e-9)


def test_edges_that_are_none_are_refused(llama, problem_of):
    problem = problem_of(llama, [ROW])
    for edge in (EDGE._replace(layer=0), EDGE._replace(head=4), EDGE._replace(key=6)):
        with pytest.raises(MetricError, match="no attention edge"):
            attention_reasons(llama, problem.batch, problem.network, edge)
