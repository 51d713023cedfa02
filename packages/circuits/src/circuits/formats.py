"""Graphs for other programs: GraphML (Gephi, Cytoscape, networkx), DOT (Graphviz), CSV tables, Neuronpedia JSON.

All hold the same: every node with its kind, place, label, activation and absolute effect on the targets, every edge
with its direct effect. `FORMATS` names the writers; `export` calls one by name.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from circuits.export import write_neuronpedia
from circuits.graph import KINDS, LOGIT, Graph
from shared.errors import UserError
from shared.serialize import atomic_path


def node_rows(graph: Graph) -> list[dict[str, Any]]:
    """Return one row a node: number, kind, layer, position, index, label, note, activation, effect, own, remainder."""
    effect_n = graph.total_nK.abs().sum(1).tolist()
    return [
        {
            "node": node,
            "kind": KINDS[int(graph.kind_n[node])],
            "layer": int(graph.layer_n[node]),
            "position": int(graph.position_n[node]),
            "index": int(graph.index_n[node]),
            "label": graph.label(node),
            "note": graph.header.notes.get(str(node), ""),
            "activation": float(graph.activation_n[node]),
            "effect": effect_n[node],
            "own": float(graph.own_n[node]),
            "remainder": float(graph.remainder_n[node]),
        }
        for node in range(len(graph))
    ]


def edge_rows(graph: Graph) -> list[dict[str, Any]]:
    """Return one row an edge: source, target and direct effect."""
    columns = (graph.source_e.tolist(), graph.target_e.tolist(), graph.weight_e.tolist())
    return [
        {"source": source, "target": target, "weight": weight}
        for source, target, weight in zip(*columns, strict=True)
    ]


def write_csv(graph: Graph, path: Path | str) -> Path:
    """Write nodes.csv and edges.csv into a folder; returns it."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, header in (
        ("nodes.csv", node_rows(graph), ()),
        ("edges.csv", edge_rows(graph), ("source", "target", "weight")),
    ):
        with atomic_path(folder / name) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header or list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def write_graphml(graph: Graph, path: Path | str) -> Path:
    """Write the graph as GraphML through networkx; returns the path."""
    import networkx

    result = networkx.DiGraph(
        prompt=graph.header.prompt, model=graph.header.model, metric=graph.header.metric
    )
    for row in node_rows(graph):
        result.add_node(row.pop("node"), **row)
    result.add_weighted_edges_from((row["source"], row["target"], row["weight"]) for row in edge_rows(graph))
    with atomic_path(Path(path)) as partial:
        networkx.write_graphml(result, partial)
    return Path(path)


def write_dot(graph: Graph, path: Path | str) -> Path:
    """Write the graph for Graphviz: targets on top, positive edges solid, negative ones dashed; returns the path."""
    widest = float(graph.weight_e.abs().max()) if graph.n_edges else 1.0
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box, fontsize=10];"]
    for row in node_rows(graph):
        text = row["label"] + (f"\n{row['note']}" if row["note"] else "")
        shape = ", style=bold" if row["kind"] == KINDS[LOGIT] else ""
        lines.append(f"  n{row['node']} [label={_quoted(text)}{shape}];")
    for row in edge_rows(graph):
        width, style = 0.2 + 3 * abs(row["weight"]) / widest, "solid" if row["weight"] >= 0 else "dashed"
        weight = f"label={_quoted(format(row['weight'], '.3g'))}, weight_value={row['weight']!r}"
        lines.append(
            f"  n{row['source']} -> n{row['target']} [{weight}, penwidth={width:.2f}, style={style}];"
        )
    with atomic_path(Path(path)) as partial:
        partial.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")
    return Path(path)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


FORMATS: dict[str, Callable[[Graph, Path | str], Path]] = {
    "neuronpedia": write_neuronpedia,
    "graphml": write_graphml,
    "dot": write_dot,
    "csv": write_csv,
}


def export(graph: Graph, name: str, path: Path | str) -> Path:
    """Write the graph in the named format (FORMATS); `csv` takes a folder. Returns the path."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name](graph, path)
