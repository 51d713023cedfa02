"""Exports hold every node and edge: GraphML through networkx, CSV, DOT, and pruned graphs in Neuronpedia's schema."""

import csv
import json
import re

import pytest

from circuits.export import SCHEMA
from circuits.formats import FORMATS, edge_rows, export, node_rows
from circuits.prune import prune
from circuits.tracing import trace
from shared.errors import UserError


@pytest.fixture(scope="module")
def graph():
    from shared.models import ModelConfig, load

    model = load(ModelConfig("random:llama", dtype="float64"))
    return trace(model, 'a "b" \\ c', top_k=2, max_nodes=20, max_edges=80)


def test_graphml_is_read_back_by_networkx(graph, tmp_path):
    import networkx

    read = networkx.read_graphml(export(graph, "graphml", tmp_path / "graph.graphml"), node_type=int)
    assert len(read) == len(graph)
    assert read.number_of_edges() == graph.n_edges
    for row in node_rows(graph):
        assert read.nodes[row.pop("node")] == row
    for row in edge_rows(graph):
        assert read.edges[row["source"], row["target"]]["weight"] == row["weight"]


def test_tables_are_read_back(graph, tmp_path):
    folder = export(graph, "csv", tmp_path / "tables")
    with (folder / "nodes.csv").open(newline="", encoding="utf-8") as file:
        nodes = list(csv.DictReader(file))
    with (folder / "edges.csv").open(newline="", encoding="utf-8") as file:
        edges = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in node_rows(graph)] == nodes
    assert [float(edge["weight"]) for edge in edges] == graph.weight_e.tolist()


def test_dot_names_every_node_and_edge_once(graph, tmp_path):
    text = export(graph, "dot", tmp_path / "graph.dot").read_text(encoding="utf-8")
    labels = re.findall(r'^  n(\d+) \[label="((?:[^"\\]|\\.)*)"', text, re.M)
    assert [int(node) for node, _ in labels] == list(range(len(graph)))
    arrows = re.findall(r"^  n(\d+) -> n(\d+) \[", text, re.M)
    assert [(int(a), int(b)) for a, b in arrows] == list(
        zip(graph.source_e.tolist(), graph.target_e.tolist(), strict=True)
    )
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert bare.count("{") == bare.count("}") == 1
    assert '"' not in bare


def test_pruned_graphs_fit_the_schema(graph, tmp_path):
    from jsonschema import validate

    content = json.loads(export(prune(graph), "neuronpedia", tmp_path / "graph.json").read_text())
    validate(content, SCHEMA)
    assert content["metadata"]["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    assert content["metadata"]["generation_settings"]["hashes"] == graph.header.hashes()


def test_unknown_formats_are_refused(graph, tmp_path):
    with pytest.raises(UserError, match=", ".join(FORMATS)):
        export(graph, "gexf", tmp_path / "graph")
