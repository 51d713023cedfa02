"""Pruned, merged and compared graphs: the ledger still closes, absent counts as zero, masses say what is left."""

import dataclasses

import pytest
import torch

from circuits.graph import ATTN_BIAS, LOGIT, MLP_BIAS, NEURON, GraphError, kept_share
from circuits.merge import DIFFERENT, always_on, combine, consensus_graph, difference_graph, mean_graph
from circuits.prune import graph_influence, prune, without
from circuits.tracing import trace_problem
from shared.errors import UserError

ROWS = [[1, 40, 77, 9, 120], [1, 40, 13, 55, 7], [1, 8, 30, 61, 99]]


@pytest.fixture(scope="module")
def graphs():
    """Three prompts of a family with biases and learned positions, traced to one target each."""
    from circuits.attribution import pose
    from circuits.metric import token_logits
    from shared.models import ModelConfig, load
    from shared.tokens import pad

    model = load(ModelConfig("random:gpt2", dtype="float64"))
    problem = pose(
        model, pad(ROWS, [5, 5, 5], 0), lambda logits, at: token_logits(logits, at, [[7], [7], [7]])
    )
    return [trace_problem(problem, row, max_nodes=30, max_edges=300) for row in range(3)]


def by_place(graph):
    """Edges and nodes by place instead of number."""
    places = list(
        zip(*(getattr(graph, f"{name}_n").tolist() for name in ("kind", "layer", "position", "index")))
    )
    edges = zip(graph.source_e.tolist(), graph.target_e.tolist(), graph.weight_e.tolist())
    return places, {(places[source], places[target]): weight for source, target, weight in edges}


def test_inflows_state_all_that_a_node_receives(graphs):
    graph = graphs[0]
    kept_n, bias_n, remainder_n = graph.inflows()
    torch.testing.assert_close(kept_n + bias_n + remainder_n, graph.inflow())
    received = (graph.kind_n == NEURON) | (graph.kind_n == LOGIT)
    torch.testing.assert_close(graph.inflow()[received], graph.activation_n[received])
    biases = (graph.kind_n == ATTN_BIAS) | (graph.kind_n == MLP_BIAS)
    node = int(((graph.kind_n == NEURON) & (graph.layer_n == 2)).nonzero()[0])
    sent = sum(
        weight
        for source, target, weight in zip(graph.source_e.tolist(), graph.target_e.tolist(), graph.weight_e)
        if target == node and biases[source]
    )
    assert float(bias_n[node]) == pytest.approx(float(sent + graph.own_n[node]))
    assert bool(graph.own_n[graph.kind_n == NEURON].all())


def test_kept_parts_still_close_and_say_their_mass(graphs):
    graph = graphs[0]
    nodes_n = torch.ones(len(graph), dtype=torch.bool)
    nodes_n[graph.kind_n == NEURON] = torch.arange(int((graph.kind_n == NEURON).sum())) % 2 == 0
    edges_e = torch.arange(graph.n_edges) % 3 != 0
    part = graph.keep(nodes_n, edges_e)
    assert part.closure_error() < 1e-10
    assert len(part) == int(nodes_n.sum())
    places, edges = by_place(graph)
    part_places, part_edges = by_place(part)
    assert part_places == [place for place, kept in zip(places, nodes_n.tolist()) if kept]
    expected = {
        pair: weight
        for (pair, weight), kept in zip(edges.items(), edges_e.tolist())
        if kept and set(pair) <= set(part_places)
    }
    assert part_edges == expected
    for node, note in part.header.notes.items():
        assert graph.header.notes[str(places.index(part_places[int(node)]))] == note
    effect_n = graph.total_nK.abs().sum(1) * (graph.kind_n == NEURON)
    mass = graph.header.node_mass_kept * float(effect_n[nodes_n].sum() / effect_n.sum())
    assert part.header.node_mass_kept == pytest.approx(mass)
    assert 0 < part.header.edge_mass_kept < graph.header.edge_mass_kept


def test_pruning_keeps_the_asked_share_of_influence(graphs):
    graph = graphs[0]
    scores_n, scores_e = graph_influence(graph)
    assert bool((scores_n >= 0).all())
    assert bool((scores_e >= 0).all())
    neurons = graph.kind_n == NEURON
    sizes = []
    for share in (0.3, 0.8, 1.0):
        pruned = prune(graph, share, 0.98)
        assert pruned.closure_error() < 1e-10
        places = dict(zip(by_place(graph)[0], scores_n.tolist()))
        kept = sum(places[place] for place in by_place(pruned)[0] if place[0] == NEURON)
        assert kept <= float(scores_n[neurons].sum()) * (1 + 1e-9)
        sizes.append(int((pruned.kind_n == NEURON).sum()))
        assert pruned.header.settings["pruning"] == {"node_threshold": share, "edge_threshold": 0.98}
        for end in (pruned.source_e, pruned.target_e):  # no neuron is a dead end
            assert set((pruned.kind_n == NEURON).nonzero()[:, 0].tolist()) <= set(end.tolist())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] <= int(neurons.sum())
    assert int((prune(graph, 0.3).kind_n == LOGIT).sum()) == 1
    with pytest.raises(UserError, match="node_share"):
        prune(graph, 0.0)


def test_influence_of_a_chain_is_a_product_of_shares(graphs):
    """One path token -> neuron -> target among what the remainders take: shares multiply along it."""
    graph = graphs[0]
    target = int((graph.kind_n == LOGIT).nonzero()[0])
    into = {
        source: i
        for i, (source, end) in enumerate(zip(graph.source_e.tolist(), graph.target_e.tolist()))
        if end == target
    }
    neuron = next(
        source for source in into if graph.kind_n[source] == NEURON and (graph.target_e == source).any()
    )
    below = int((graph.target_e == neuron).nonzero()[0])
    edges_e = torch.zeros(graph.n_edges, dtype=torch.bool)
    edges_e[into[neuron]] = edges_e[below] = True
    chain = graph.keep(torch.ones(len(graph), dtype=torch.bool), edges_e)
    scores_n, scores_e = graph_influence(chain)
    outside_n = chain.own_n.abs() + chain.remainder_n.abs()
    upper, lower = (chain.weight_e[chain.target_e == end].abs().sum() for end in (target, neuron))
    share_upper, share_lower = upper / (upper + outside_n[target]), lower / (lower + outside_n[neuron])
    assert float(scores_n[neuron]) == pytest.approx(float(share_upper))
    source = int(graph.source_e[below])
    assert float(scores_n[source]) == pytest.approx(float(share_upper * share_lower))
    assert sorted(scores_e.tolist()) == pytest.approx(
        sorted([float(share_upper), float(share_upper * share_lower)])
    )


def test_absent_edges_count_as_zero(graphs):
    """D7: a mean over all graphs, not over those where the edge occurs."""
    mean = mean_graph(graphs)
    assert mean.closure_error() < 1e-10
    _, edges = by_place(mean)
    parts = [by_place(graph)[1] for graph in graphs]
    assert set(edges) == set().union(*parts)
    for pair, weight in edges.items():
        assert weight == pytest.approx(sum(part.get(pair, 0.0) for part in parts) / 3)
    assert any(pair not in parts[0] for pair in edges)
    assert mean.header.tokens[1] == DIFFERENT
    assert mean.header.tokens[0] == graphs[0].header.tokens[0]
    assert mean.header.settings["prompts"] == [graph.header.prompt for graph in graphs]


def test_consensus_keeps_what_most_graphs_have(graphs):
    places = [set(by_place(graph)[0]) for graph in graphs]
    edges = [set(by_place(graph)[1]) for graph in graphs]
    for share, least in ((1.0, 3), (0.5, 2), (0.0, 1)):
        graph = consensus_graph(graphs, share)
        assert graph.closure_error() < 1e-10
        found, pairs = by_place(graph)
        counted = {place for place in set().union(*places) if sum(place in one for one in places) >= least}
        assert {place for place in found if place[0] == NEURON} == {p for p in counted if p[0] == NEURON}
        often = {pair for pair in set().union(*edges) if sum(pair in one for one in edges) >= least}
        assert set(pairs) == often
    with pytest.raises(UserError, match="between 0"):
        consensus_graph(graphs, 1.5)


def test_difference_of_a_graph_and_itself_is_zero_and_counts_tell(graphs):
    none = difference_graph(graphs[0], graphs[0])
    assert not none.weight_e.any()
    assert not none.activation_n.any()
    one = difference_graph(graphs[0], graphs[1])
    assert one.closure_error() < 1e-9
    _, edges = by_place(one)
    first, second = by_place(graphs[0])[1], by_place(graphs[1])[1]
    for pair in set(first) | set(second):
        assert edges[pair] == pytest.approx(first.get(pair, 0.0) - second.get(pair, 0.0))
    both = combine(graphs[:2], [1.0, -1.0], "difference")
    assert int(both.count_e.sum()) == graphs[0].n_edges + graphs[1].n_edges
    assert both.count_n.max() == 2


def test_graphs_that_do_not_fit_are_refused(graphs):
    other = dataclasses.replace(
        graphs[1], header=dataclasses.replace(graphs[1].header, metric="log-probability")
    )
    with pytest.raises(GraphError, match="different metrics"):
        mean_graph([graphs[0], other])
    with pytest.raises(UserError, match="no graphs"):
        mean_graph([])


def test_always_on_neurons_are_counted_and_taken_out(graphs):
    found = always_on(graphs, 0.6)
    sets = [{(layer, neuron) for layer, _, neuron in graph.neurons()} for graph in graphs]
    for layer, neuron, share in found:
        assert share == pytest.approx(sum((layer, neuron) in one for one in sets) / 3)
        assert share >= 0.6
    assert {neuron[:2] for neuron in always_on(graphs, 0.0)} == set().union(*sets)
    assert [neuron.share for neuron in found] == sorted((neuron.share for neuron in found), reverse=True)
    graph = graphs[0]
    names = {(neuron.layer, neuron.neuron) for neuron in found}
    bare = without(graph, names)
    assert bare.closure_error() < 1e-10
    assert not names & {(layer, neuron) for layer, _, neuron in bare.neurons()}
    assert bare.header.node_mass_kept < graph.header.node_mass_kept
    assert len(without(graph, set())) == len(graph)


def test_a_share_of_nothing_is_all_of_it():
    assert kept_share(torch.zeros(3), torch.zeros(3, dtype=torch.bool)) == 1.0


def test_exports_of_combined_graphs_have_an_id_for_every_node():
    """Several targets and several prompts: targets that differ, that agree, and two of one token."""
    from jsonschema import validate

    from circuits.attribution import pose
    from circuits.export import SCHEMA, neuronpedia, target_words
    from circuits.metric import token_logits
    from shared.models import ModelConfig, load
    from shared.tokens import pad

    model = load(ModelConfig("random:gpt2", dtype="float64"))
    targets = [[7, 5, 9, 9], [7, 6, 8, 8], [7, 4, 3, 9]]
    batch = pad(ROWS, [5, 5, 5], 0)
    problem = pose(model, batch, lambda logits, at: token_logits(logits, at, targets))
    graphs = [trace_problem(problem, row, max_nodes=10, max_edges=100) for row in range(3)]
    assert target_words(graphs[0].header.target_ids) == [7, 5, -3, -4]
    for graph in [*graphs, mean_graph(graphs), consensus_graph(graphs), difference_graph(*graphs[:2])]:
        content = neuronpedia(graph)
        validate(content, SCHEMA)
        for name in ("node_id", "jsNodeId"):
            ids = [
                node[name]
                for node in content["nodes"]
                if name == "node_id" or node["feature_type"] == "logit"
            ]
            assert len(set(ids)) == len(ids)
        ids = [node["node_id"] for node in content["nodes"]]
        ends = [(ids.index(link["source"]), ids.index(link["target"])) for link in content["links"]]
        assert ends == list(zip(graph.source_e.tolist(), graph.target_e.tolist(), strict=True))
        features = [node["feature"] for node in content["nodes"] if node["feature_type"] == "logit"]
        assert features == [token if token >= 0 else None for token in graph.header.target_ids]
    ids = [node["node_id"] for node in neuronpedia(mean_graph(graphs))["nodes"]]
    n_layers = model.architecture.n_layers
    assert {f"{n_layers + 1}_{word}_4" for word in (7, -2, -3, -4)} <= set(ids)
