"""Graphs over a data set: mean, union, consensus, difference, and neurons that are always on (digest 1.7; D7).

Graphs of prompts of one length (and one metric) are vectors over the same places: a node is (kind, layer, position,
index), an edge a pair of them, and what a graph does not show is zero. Everything here is one linear combination of
such vectors (`combine`), cut to what occurs often enough:

    mean, union      1/n of each graph; an absent edge counts as zero, so that rare edges are not inflated
    consensus        the mean, cut to nodes and edges that at least a share of the graphs has
    difference       one graph less another

The ledger is linear too, so it closes in all of them: activation = kept + own + remainder, of the mean or difference.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph import NEURON, Graph, GraphError, Header
from shared.errors import UserError

PLACE = ("kind_n", "layer_n", "position_n", "index_n")
DIFFERENT = "*"  # stands for tokens that differ between the prompts


class Combined(NamedTuple):
    """A combined graph, and in how many of the graphs each of its nodes and edges occurs."""

    graph: Graph
    count_n: Int[Tensor, " n"]
    count_e: Int[Tensor, " e"]


def combine(graphs: Sequence[Graph], coefficients: Sequence[float], name: str) -> Combined:
    """Return the sum of coefficient times graph over the union of their nodes and edges."""
    _check(graphs)
    places_m4 = torch.cat(
        [torch.stack([getattr(graph, column) for column in PLACE], dim=1) for graph in graphs]
    )
    places_n4, node_m, count_n = places_m4.unique(dim=0, return_inverse=True, return_counts=True)
    n, parts = len(places_n4), node_m.split([len(graph) for graph in graphs])
    code_x = torch.cat(
        [part[graph.target_e] * n + part[graph.source_e] for graph, part in zip(graphs, parts, strict=True)]
    )
    code_e, edge_x, count_e = code_x.unique(return_inverse=True, return_counts=True)
    columns = dict(zip(PLACE, places_n4.T.contiguous(), strict=True))
    for column in ("activation_n", "total_nK", "token_nT", "own_n", "remainder_n"):
        columns[column] = _summed(graphs, coefficients, column, node_m, n)
    columns["weight_e"] = _summed(graphs, coefficients, "weight_e", edge_x, len(code_e))
    graph = Graph(
        header=_header(graphs, name, parts),
        source_e=code_e % n,
        target_e=code_e // n,
        **columns,
    )
    return Combined(graph, count_n, count_e)


def _summed(
    graphs: Sequence[Graph], coefficients: Sequence[float], column: str, place_x: Tensor, size: int
) -> Tensor:
    scaled = [factor * getattr(graph, column) for graph, factor in zip(graphs, coefficients, strict=True)]
    values = torch.cat(scaled)
    return values.new_zeros(size, *values.shape[1:]).index_add_(0, place_x, values)


def _check(graphs: Sequence[Graph]) -> None:
    if not graphs:
        raise UserError("there are no graphs to combine")
    first = graphs[0].header
    for graph in graphs[1:]:
        for label, mine, theirs in (
            ("models", first.fingerprint, graph.header.fingerprint),
            ("rules", first.rules, graph.header.rules),
            ("metrics", first.metric, graph.header.metric),
            ("numbers of tokens", len(first.tokens), len(graph.header.tokens)),
            ("numbers of targets", len(first.targets), len(graph.header.targets)),
        ):
            if mine != theirs:
                raise GraphError(
                    f"graphs of different {label} cannot be combined: {mine} in the first, {theirs} in another"
                )


def _header(graphs: Sequence[Graph], name: str, parts: Sequence[Tensor]) -> Header:
    headers = [graph.header for graph in graphs]
    first, n = headers[0], len(headers)
    notes = {
        str(int(part[int(node)])): note
        for header, part in zip(headers, parts, strict=True)
        for node, note in header.notes.items()
    }

    def mean(field: str) -> list[float]:
        return torch.tensor([getattr(header, field) for header in headers]).double().mean(0).tolist()

    columns = [list(column) for column in zip(*(header.tokens for header in headers), strict=True)]
    ids = [list(column) for column in zip(*(header.token_ids for header in headers), strict=True)]
    targets = [list(column) for column in zip(*(header.targets for header in headers), strict=True)]
    target_ids = [list(column) for column in zip(*(header.target_ids for header in headers), strict=True)]
    return replace(
        first,
        prompt=first.prompt if len({header.prompt for header in headers}) == 1 else f"{name} of {n} graphs",
        tokens=[column[0] if len(set(column)) == 1 else DIFFERENT for column in columns],
        token_ids=[column[0] if len(set(column)) == 1 else -1 for column in ids],
        targets=[column[0] if len(set(column)) == 1 else f"target {k}" for k, column in enumerate(targets)],
        target_ids=[column[0] if len(set(column)) == 1 else -1 for column in target_ids],
        target_values=mean("target_values"),
        target_probabilities=mean("target_probabilities"),
        settings={"combined": name, "prompts": [header.prompt for header in headers]},
        notes=dict(sorted(notes.items(), key=lambda item: int(item[0]))),
        conservation_error=max(header.conservation_error for header in headers),
        node_mass_kept=sum(header.node_mass_kept for header in headers) / n,
        edge_mass_kept=sum(header.edge_mass_kept for header in headers) / n,
    )


def mean_graph(graphs: Sequence[Graph]) -> Graph:
    """Return the mean over the union of all nodes and edges; what a graph does not show counts as zero."""
    return combine(graphs, [1 / len(graphs)] * len(graphs) if graphs else [], "mean").graph


def consensus_graph(graphs: Sequence[Graph], share: float = 0.9) -> Graph:
    """Return the mean graph, cut to the nodes and edges that at least `share` of the graphs have."""
    if not 0 <= share <= 1:
        raise UserError(f"share is between 0 (the union) and 1 (in every graph), got {share}")
    both = combine(graphs, [1 / len(graphs)] * len(graphs) if graphs else [], "consensus")
    least = share * len(graphs) - 1e-9
    often_n = (both.count_n >= least) | (both.graph.kind_n != NEURON)
    graph = both.graph.keep(often_n, both.count_e >= least)
    settings = graph.header.settings | {"share": share}
    return replace(graph, header=replace(graph.header, settings=settings))


def difference_graph(graph: Graph, other: Graph) -> Graph:
    """Return the first graph less the second, over the union of their nodes and edges."""
    result = combine([graph, other], [1.0, -1.0], "difference").graph
    values = [a - b for a, b in zip(graph.header.target_values, other.header.target_values, strict=True)]
    return replace(result, header=replace(result.header, target_values=values))


class AlwaysOn(NamedTuple):
    """A neuron, and the share of the graphs it occurs in (at any position)."""

    layer: int
    neuron: int
    share: float


def always_on(graphs: Sequence[Graph], share: float = 0.9) -> list[AlwaysOn]:
    """Return the neurons in at least `share` of the graphs, the most frequent first.

    Give it graphs of neutral prompts of any length: what is in them is not about any one of them. `circuits.prune.
    without` takes such neurons out of a graph, and the masses of both say what they carry.
    """
    if not graphs:
        raise UserError("there are no graphs to count neurons in")
    counts = Counter(place for graph in graphs for place in {(layer, n) for layer, _, n in graph.neurons()})
    found = [AlwaysOn(*place, count / len(graphs)) for place, count in counts.items()]
    return sorted(
        (neuron for neuron in found if neuron.share >= share - 1e-9),
        key=lambda x: (-x.share, x.layer, x.neuron),
    )
