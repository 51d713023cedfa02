"""Circuits of edges over a data set: which edges matter on training data, and do they carry the answer on test data?

1. Nodes: a set of neurons (layer, position, index), for example the top of a mean node ranking.
2. Scores (`edge_scores`) of every pair among them and to the logits, the signed mean over training examples:
       relp        delta_s * da_t/da_s (direct, frozen) * dm/da_t (total, frozen): the share of m through the edge
       direct      |delta_s * da_t/da_s|: the edge's own size, whatever its target does; a control
       magnitude   |delta_s * delta_t| of its end nodes (a logit counts as the largest node); a control
       random      uniform noise, a control
   with delta the activation minus its reference. Every example counts, so that rare edges are not inflated.
3. `edge_curve`: the top k edges by absolute score run in the real model, alone and cut out of it
   (`circuits.edge_patching`), for the same faithfulness and completeness as circuits of nodes have.

The most that edges among n nodes can reach is the faithfulness of the n nodes themselves: all pairs are their pathway.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import Problem
from circuits.edge_patching import EdgeSet, causal_pairs, run_edges
from circuits.edges import Neurons, direct_effects
from circuits.faithfulness import CurvePoint, pathway_values
from circuits.metric import Metric
from circuits.relp import relp
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

Pairs = Float[Tensor, "S n"]


def edge_scores(problem: Problem, neurons: Neurons, estimator: str = "relp", seed: int = 0) -> Pairs:
    """Return the score of every pair among the neurons and to the metric's targets (rows: n neurons, then K logits).

    All prompts of the problem have one length. Pairs that cannot be edges score zero.
    """
    if estimator not in EDGE_ESTIMATORS:
        raise UserError(f"unknown edge estimator {estimator!r}; there are: {', '.join(EDGE_ESTIMATORS)}")
    if not problem.network.real_BT.all():
        raise UserError("a mean over examples needs prompts of one length: group them first")
    scores_Sn = EDGE_ESTIMATORS[estimator](problem, neurons, seed)
    return scores_Sn.masked_fill(~causal_pairs(neurons, problem.metric.positions_BK), 0.0)


def _deltas(problem: Problem, neurons: Neurons) -> Float[Tensor, "B n"]:
    return torch.stack([neurons.gather(delta_LTN) for delta_LTN in problem.delta_BLTN])


def _mean_over_examples(
    problem: Problem, neurons: Neurons, score: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Pairs:
    """Return the mean of `score(effect of one unit S n, delta n, effect on the targets per unit n)`."""
    everything_T = torch.arange(problem.network.real_BT.shape[1], device=problem.network.real_BT.device)
    totals_BLTN = relp(problem.network, problem.metric).sensitivity_BKLTN.sum(1)
    total_Sn: Tensor | None = None
    for row, delta_n in enumerate(_deltas(problem, neurons)):
        metric = problem.metric.row(row, everything_T)
        unit_Sn = direct_effects(problem.network.row(row), neurons, metric).unit_Sn
        part_Sn = score(unit_Sn, delta_n, neurons.gather(totals_BLTN[row]))
        total_Sn = part_Sn if total_Sn is None else total_Sn + part_Sn
    assert total_Sn is not None
    return total_Sn / len(problem.batch)


def _relp(problem: Problem, neurons: Neurons, seed: int) -> Pairs:
    def score(unit_Sn: Tensor, delta_n: Tensor, total_n: Tensor) -> Tensor:
        logits_K = total_n.new_ones(len(unit_Sn) - len(total_n))
        return unit_Sn * delta_n * torch.cat([total_n, logits_K])[:, None]

    return _mean_over_examples(problem, neurons, score)


def _direct(problem: Problem, neurons: Neurons, seed: int) -> Pairs:
    return _mean_over_examples(problem, neurons, lambda unit_Sn, delta_n, _: (unit_Sn * delta_n).abs())


def _magnitude(problem: Problem, neurons: Neurons, seed: int) -> Pairs:
    size_n = _deltas(problem, neurons).abs().mean(0)
    n_targets = problem.metric.positions_BK.shape[1]
    return torch.cat([size_n, size_n.max().expand(n_targets)])[:, None] * size_n


def _random(problem: Problem, neurons: Neurons, seed: int) -> Pairs:
    shape = (len(neurons) + problem.metric.positions_BK.shape[1], len(neurons))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(problem.delta_BLTN)


EDGE_ESTIMATORS: dict[str, Callable[[Problem, Neurons, int], Pairs]] = {
    "relp": _relp,
    "direct": _direct,
    "magnitude": _magnitude,
    "random": _random,
}


def top_edges(neurons: Neurons, scores_Sn: Pairs, k: int) -> EdgeSet:
    """Return the k edges of largest absolute score; pairs that score zero are never edges."""
    flat = scores_Sn.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(k, flat.numel())).indices] = True
    return EdgeSet(neurons, (mask & (flat > 0)).reshape(scores_Sn.shape))


def evaluate_edges(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    circuits: Sequence[EdgeSet],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> list[CurvePoint]:
    """Return the values of every edge set on one batch with one target: alone, cut out, and the two ends."""

    def value_of(keep: bool) -> Float[Tensor, " B"]:
        shape = (1, model.architecture.n_layers, 1, model.architecture.n_neurons)
        keep_BLTN = torch.full(shape, keep, device=model.device)
        return pathway_values(model, batch, metric, keep_BLTN, reference_BLTN)[:, 0]

    full_B, empty_B = value_of(True), value_of(False)
    points = []
    for edges in circuits:
        alone_B = run_edges(model, batch, metric, edges, reference_BLTN)[:, 0]
        rest_B = run_edges(model, batch, metric, edges, reference_BLTN, cut=True)[:, 0]
        points.append(CurvePoint(len(edges), alone_B, rest_B, full_B, empty_B))
    return points


def edge_curve(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    neurons: Neurons,
    scores_Sn: Pairs,
    sizes: Sequence[int],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> list[CurvePoint]:
    """Return the values of the top k edges by absolute score, for every size that there are edges for."""
    circuits = [top_edges(neurons, scores_Sn, size) for size in sizes]
    return evaluate_edges(model, batch, metric, circuits, reference_BLTN)
