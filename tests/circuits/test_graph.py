"""Graphs: the ledger closes, files round-trip exactly, pruning keeps what it says (I12)."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate

from circuits.attribution import pose
from circuits.edges import Neurons, direct_effects
from circuits.export import SCHEMA, neuronpedia, write_neuronpedia
from circuits.graph import EMBEDDING, KINDS, LOGIT, NEURON, GraphError, load_graph
from circuits.metric import MetricError, direction, top_logits
from circuits.prune import influence, influence_keep, select_edges, select_nodes
from circuits.tracing import trace, trace_problem
from circuits.view import page_data
from shared.tokens import pad

PROMPT = "the </script> cat"


@pytest.fixture(scope="module")
def graph():
    from shared.models import ModelConfig, load

    return trace(
        load(ModelConfig("random:gpt2", dtype="float64")), PROMPT, top_k=3, max_nodes=40, max_edges=200
    )


def test_ledger_closes_with_and_without_pruning(any_model, problem_of):
    problem = problem_of(any_model)
    for limits in ({"max_nodes": 30, "max_edges": 50}, {"max_nodes": 100, "max_edges": 10**6}):
        for row in (0, 1):
            graph = trace_problem(problem, row, **limits)
            assert graph.closure_error() < 1e-10
            assert graph.header.conservation_error < 1e-10
            assert 0 < graph.header.node_mass_kept < 1


def test_edges_and_totals_are_those_of_the_network(llama, problem_of):
    problem = problem_of(llama)
    graph = trace_problem(problem, 0, max_nodes=30, max_edges=10**6)
    columns = zip(*graph.neurons(), strict=True)
    neurons = Neurons(*(torch.tensor(column) for column in columns))
    keep = problem.network.real_BT[0].nonzero()[:, 0]
    effects = direct_effects(problem.network.row(0), neurons, problem.metric.row(0, keep))
    first = int((graph.kind_n == NEURON).nonzero()[0])
    for source, target, weight in zip(
        graph.source_e.tolist(), graph.target_e.tolist(), graph.weight_e, strict=True
    ):
        if graph.kind_n[source] == NEURON:
            assert weight == effects.neuron_Sn[target - first, source - first]
        else:
            assert graph.kind_n[source] == EMBEDDING
            assert weight == effects.embed_ST[target - first, graph.position_n[source]]
    assert graph.header.edge_mass_kept == pytest.approx(1.0)


def test_edges_go_upwards_and_forwards(graph):
    rank_n = 2 * graph.layer_n + (graph.kind_n == NEURON)  # a bias of a layer may reach its neurons
    assert (rank_n[graph.source_e] < rank_n[graph.target_e]).all()
    assert (graph.position_n[graph.source_e] <= graph.position_n[graph.target_e]).all()


def test_kinds_of_a_family_with_biases_and_positions(graph):
    kinds = {KINDS[kind] for kind in graph.kind_n.tolist()}
    assert kinds == set(KINDS)
    assert (graph.kind_n == EMBEDDING).sum() == len(graph.header.tokens)
    assert (graph.kind_n == LOGIT).sum() == 3
    assert len(graph.header.notes) == (graph.kind_n == NEURON).sum() == len(graph.neurons())


def test_strongest_neurons_come_first(graph):
    totals = {node: float(total) for node, total in zip(graph.neurons(), _neuron_totals(graph), strict=True)}
    ranked = graph.strongest(len(totals))
    assert sorted(ranked) == sorted(totals)
    assert [totals[node] for node in ranked] == sorted(totals.values(), reverse=True)
    assert graph.strongest(3) == ranked[:3]


def _neuron_totals(graph):
    return graph.total_nK[graph.kind_n == NEURON].abs().sum(1)


def test_file_round_trip_is_lossless(graph, tmp_path):
    loaded = load_graph(graph.save(tmp_path / "graph"))
    assert loaded.header == graph.header
    for name, column in graph.columns().items():
        assert torch.equal(column, loaded.columns()[name])
        assert column.dtype == loaded.columns()[name].dtype


def test_unreadable_files_are_refused_with_the_reason(graph, tmp_path):
    with pytest.raises(GraphError, match="holds no graph"):
        load_graph(tmp_path)
    folder = dataclasses.replace(graph, header=dataclasses.replace(graph.header, version=99)).save(
        tmp_path / "g"
    )
    with pytest.raises(GraphError, match="version 99"):
        load_graph(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: header | {"colour": "red"}, "unknown key 'colour'"),
        (
            lambda header: {key: value for key, value in header.items() if key != "prompt"},
            "missing key 'prompt'",
        ),
        (lambda header: header | {"n_layers": "two"}, "'n_layers' must be int"),
        (lambda header: [header], "version None"),
    ],
)
def test_headers_of_another_shape_are_refused_by_key(graph, tmp_path, change, reason):
    path = graph.save(tmp_path / "graph") / "graph.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(GraphError, match=reason):
        load_graph(tmp_path / "graph")
    path.write_text("{")
    with pytest.raises(GraphError, match="not JSON"):
        load_graph(tmp_path / "graph")


def test_thresholds_are_relative_to_the_absolute_value():
    """D3: a negative metric must not keep everything."""
    totals = torch.tensor([[[[0.5, -0.002, 0.02, -0.3]]]])
    for value in (1.0, -1.0):
        chosen = select_nodes(totals, torch.tensor([value]), threshold=0.01)
        assert chosen.mask.flatten().tolist() == [True, False, True, True]
        assert chosen.mass_kept == pytest.approx(0.82 / 0.822)
    assert select_nodes(totals, torch.tensor([1.0]), 0.01, max_nodes=1).mask.flatten().tolist() == [
        True,
        False,
        False,
        False,
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(0, 15))
def test_selected_edges_are_the_strongest(strengths, limit):
    matrix = torch.tensor(strengths)[None]
    chosen = select_edges(matrix, limit)
    assert chosen.mask.sum() == min(limit, int((matrix > 0).sum()))
    kept, left = matrix[chosen.mask], matrix[~chosen.mask]
    if len(kept) and len(left):
        assert kept.min() >= left.max()
    if matrix.sum() > 0:
        assert chosen.mass_kept == pytest.approx(float(kept.sum() / matrix.sum()))


def test_influence_is_the_sum_over_paths():
    weights = torch.zeros(4, 4, dtype=torch.float64)  # rows are targets: 3 <- 1, 2; 2 <- 0, 1; 1 <- 0
    weights[3, 1], weights[3, 2], weights[2, 0], weights[2, 1], weights[1, 0] = 1.0, -3.0, 2.0, 2.0, 5.0
    scores = influence(weights, torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    b = weights.abs() / weights.abs().sum(1, keepdim=True).clamp_min(1e-300)
    omega = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(scores, omega @ (b + b @ b + b @ b @ b))
    assert influence_keep(torch.tensor([1.0, 5.0, 4.0]), 0.8).tolist() == [False, True, True]
    weights[0, 3] = 1.0
    with pytest.raises(ValueError, match="cycle"):
        influence(weights, omega, max_steps=50)


def test_a_prompt_that_needs_fewer_targets_than_another_has_only_its_own(llama):
    batch = pad([[1, 40, 77, 9], [1, 90, 13, 55]], [4, 4], 0)
    with torch.no_grad():
        first_B = llama(batch)[:, -1].softmax(-1).amax(-1)
    mass = float(first_B.mean())  # one token has it in one of the rows, and not in the other
    problem = pose(llama, batch, lambda logits, at: top_logits(logits, at, 10, mass=mass))
    graphs = [trace_problem(problem, row, threshold=0.2, max_nodes=10**6) for row in (0, 1)]
    assert len({len(graph.header.targets) for graph in graphs}) == 2
    for graph, ids in zip(graphs, problem.metric.tokens, strict=True):
        assert tuple(graph.header.target_ids) == ids
        assert graph.total_nK.shape[1] == len(ids) == int((graph.kind_n == LOGIT).sum())
        assert graph.closure_error() < 1e-10
        share_nK = (
            graph.total_nK[graph.kind_n == NEURON].abs() / torch.tensor(graph.header.target_values).abs()
        )
        assert (share_nK.amax(1) >= 0.2).all()  # an empty target would let every neuron pass


@pytest.mark.parametrize("names", [None, ["along"]])
def test_a_direction_has_a_graph_without_vocabulary(llama, tmp_path, names):
    vector_1D = torch.randn(1, llama.architecture.width, generator=torch.Generator().manual_seed(2))
    batch = pad([[1, 40, 77, 9]], [4], 0)
    problem = pose(llama, batch, lambda logits, at: direction(vector_1D.double(), at, "blocks.1.output"))
    graph = load_graph(trace_problem(problem, 0, names, max_nodes=20).save(tmp_path))
    assert graph.closure_error() < 1e-10
    assert graph.header.targets == (names or ["direction at blocks.1.output 0"])
    validate(neuronpedia(graph), SCHEMA)
    assert "cannot be read off the logits" in page_data(graph)["refusal"]


def test_answers_come_in_pairs(llama):
    with pytest.raises(MetricError, match="both answer and wrong"):
        trace(llama, "x", answer="a")


def test_export_fits_the_published_schema(graph, tmp_path):
    content = json.loads(write_neuronpedia(graph, tmp_path / "graph.json").read_text())
    validate(content, SCHEMA)
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph)
    assert {link[end] for link in content["links"] for end in ("source", "target")} <= set(ids)
    assert [link["weight"] for link in content["links"]] == graph.weight_e.tolist()
    layer, position, neuron = graph.neurons()[0]
    node = next(node for node in content["nodes"] if node["node_id"] == f"{layer}_{neuron}_{position}")
    assert node["feature"] == (layer + neuron) * (layer + neuron + 1) // 2 + neuron
    assert node["activation"] in graph.activation_n.tolist()
