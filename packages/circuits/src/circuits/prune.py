"""Which nodes and edges a graph keeps, and how much of the whole they carry (digest 1.7).

Nodes are ranked by absolute total effect summed over targets; a threshold is relative to |m| (its absolute value: a
negative metric must not keep everything). Edges are ranked by the share of the targets' value that passes through
them, |direct(s -> t)| * |total(t)| / |a_t|, an absolute quantity: relative weights cancel and have no bounded size.

`prune` is circuit-tracer's pruning by cumulative influence, on a traced graph: with B the row-normalised |weights|
(what a target receives from outside of the graph counts in its row, and leads nowhere), omega the targets' shares and

    influence = omega (B + B^2 + ...)

it keeps the smallest set of neurons that holds a share of the neurons' influence (.8); on what is left, the smallest
set of edges by B_ij influence_i (.98); then drops neurons without an input or an output, and repeats that. Tokens,
biases and targets stay. What is cut goes to the remainders, so the ledger still closes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import LOGIT, NEURON, Graph, kept_share
from shared.errors import UserError


class Selection(NamedTuple):
    """A mask and the share of the absolute mass it keeps."""

    mask: Bool[Tensor, "..."]
    mass_kept: float


def select_nodes(
    totals_KLTN: Float[Tensor, "K L T N"],
    values_K: Float[Tensor, " K"],
    threshold: float = 0.005,
    max_nodes: int | None = None,
) -> Selection:
    """Keep nodes whose total effect on some target reaches `threshold` of that target's |value|, the largest first.

    `max_nodes` bounds their number by the sum of absolute effects over targets.
    """
    reach_LTN = (totals_KLTN.abs() >= threshold * values_K.abs()[:, None, None, None]).any(0)
    strength_LTN = totals_KLTN.abs().sum(0)
    mask_LTN = reach_LTN & (strength_LTN > 0)
    if max_nodes is not None and int(mask_LTN.sum()) > max_nodes:
        chosen = strength_LTN.masked_fill(~mask_LTN, -1.0).flatten().topk(max_nodes).indices
        mask_LTN = torch.zeros_like(mask_LTN).flatten().index_fill_(0, chosen, True).reshape(mask_LTN.shape)
    return Selection(mask_LTN, kept_share(strength_LTN, mask_LTN))


def select_edges(strength_Ss: Float[Tensor, "S s"], max_edges: int) -> Selection:
    """Keep the strongest non-zero entries of a targets x sources matrix of absolute strengths."""
    flat = strength_Ss.flatten()
    chosen = flat.topk(min(max_edges, flat.numel())).indices
    mask_Ss = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, chosen, True).reshape(strength_Ss.shape)
    mask_Ss &= strength_Ss > 0
    return Selection(mask_Ss, kept_share(strength_Ss, mask_Ss))


def influence(
    weight_nn: Float[Tensor, "n n"],
    logit_weight_n: Float[Tensor, " n"],
    outside_n: Float[Tensor, " n"] | None = None,
    max_steps: int = 10_000,
) -> Float[Tensor, " n"]:
    """Return omega (B + B^2 + ...) with B the row-normalised |weight| (rows are targets), omega the logit weights.

    `outside_n` is what each target receives besides; it counts in the row's sum. The graph must be acyclic, so that
    the series ends; otherwise ValueError.
    """
    rows = _normalised(weight_nn, outside_n)
    step_n, total_n = logit_weight_n @ rows, torch.zeros_like(logit_weight_n)
    for _ in range(max_steps):
        if not step_n.any():
            return total_n
        total_n, step_n = total_n + step_n, step_n @ rows
    raise ValueError("influence does not end: the weights contain a cycle")


def _normalised(weight_nn: Tensor, outside_n: Tensor | None) -> Tensor:
    rows = weight_nn.abs()
    sum_n = rows.sum(1) if outside_n is None else rows.sum(1) + outside_n.abs()
    return rows / sum_n[:, None].clamp_min(torch.finfo(rows.dtype).tiny)


def influence_keep(scores_n: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Return the smallest set of nodes that holds at least `share` of the summed scores."""
    if not len(scores_n):
        return torch.zeros_like(scores_n, dtype=torch.bool)
    order = scores_n.argsort(descending=True)
    reached = scores_n[order].cumsum(0)
    count = int((reached < share * reached[-1]).sum()) + 1
    return torch.zeros_like(scores_n, dtype=torch.bool).index_fill_(0, order[:count], True)


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98) -> Graph:
    """Return the graph pruned by cumulative influence (see the module docstring); shares are above 0 and at most 1."""
    for name, value in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 < value <= 1:
            raise UserError(f"{name} is a share above 0 and at most 1, got {value}")
    neurons_n = graph.kind_n == NEURON
    scores_n, _ = graph_influence(graph)
    kept_n = ~neurons_n
    kept_n[neurons_n] = influence_keep(scores_n[neurons_n], node_share)
    graph = graph.keep(kept_n)
    _, scores_e = graph_influence(graph)
    everything_n = torch.ones_like(graph.kind_n, dtype=torch.bool)
    graph = graph.keep(everything_n, influence_keep(scores_e, edge_share))
    graph = _without_dead_ends(graph)
    settings = graph.header.settings | {
        "pruning": {"node_threshold": node_share, "edge_threshold": edge_share}
    }
    return replace(graph, header=replace(graph.header, settings=settings))


def graph_influence(graph: Graph) -> tuple[Float[Tensor, " n"], Float[Tensor, " e"]]:
    """Return the influence on the targets of every node, and of every edge: B_ij times its target's influence."""
    n, weight_e = len(graph), graph.weight_e
    omega_n = graph.activation_n.abs().masked_fill(graph.kind_n != LOGIT, 0.0)
    omega_n = omega_n / omega_n.sum().clamp_min(torch.finfo(omega_n.dtype).tiny)
    weight_nn = weight_e.new_zeros(n, n).index_put(
        (graph.target_e, graph.source_e), weight_e, accumulate=True
    )
    outside_n = graph.own_n.abs() + graph.remainder_n.abs()
    scores_n = influence(weight_nn, omega_n, outside_n)
    edge_nn = _normalised(weight_nn, outside_n) * (scores_n + omega_n)[:, None]
    return scores_n, edge_nn[graph.target_e, graph.source_e]


def _without_dead_ends(graph: Graph) -> Graph:
    """Drop neurons without an incoming or without an outgoing edge until none is left."""
    while True:
        ends_n = torch.zeros_like(graph.kind_n)
        inputs_n = ends_n.index_add(0, graph.target_e, torch.ones_like(graph.target_e))
        outputs_n = ends_n.index_add(0, graph.source_e, torch.ones_like(graph.source_e))
        dead_n = (graph.kind_n == NEURON) & ((inputs_n == 0) | (outputs_n == 0))
        if not dead_n.any():
            return graph
        graph = graph.keep(~dead_n)


def without(graph: Graph, neurons: set[tuple[int, int]]) -> Graph:
    """Return the graph without some neurons (layer, index), wherever they occur; what they carry is left out."""
    places = zip(graph.layer_n.tolist(), graph.index_n.tolist(), strict=True)
    named_n = torch.tensor([place in neurons for place in places], device=graph.kind_n.device)
    return graph.keep(~(named_n & (graph.kind_n == NEURON)))
